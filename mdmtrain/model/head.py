"""The output head: only masked positions are ever turned into logits.

A masked diffusion model needs on average half of the positions' logits, and none at once: rows are gathered first, then
taken in chunks of fixed size, each recomputed in the backward pass, so memory holds one chunk of [rows, vocabulary].
The loop lives inside one forward call, because FSDP counts calls and the number of chunks differs from rank to rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Head(nn.Module):
    """Linear map to the vocabulary. With tied embeddings it owns no parameter and is handed the embedding's."""

    def __init__(self, d_model: int, vocab_size: int, tied: bool, chunk: int, fused: bool = False):
        super().__init__()
        self.chunk, self.fused = chunk, fused
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(self, rows: Tensor, targets: Tensor | None, tied_weight: Tensor | None) -> Tensor:
        """rows: [K, d_model], the hidden states of the masked positions; K = 0 is legal.

        targets: int64 [K] -> cross-entropy in nats, float32 [K]; None -> logits, float32 [K, vocab_size].
        """
        weight = self.weight if tied_weight is None else tied_weight
        assert weight is not None, "tied embeddings: the embedding's weight is missing"
        if targets is None:
            return F.linear(rows, weight).float()
        if self.fused:
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=self.chunk)
            return F.linear_cross_entropy(rows, weight, targets, reduction="none", options=options)
        if len(rows) <= self.chunk:  # one chunk: nothing to save by recomputing it
            return _cross_entropy(rows, targets, weight)
        losses = [
            checkpoint(_cross_entropy, r, t, weight, use_reentrant=False)
            for r, t in zip(rows.split(self.chunk), targets.split(self.chunk), strict=True)
        ]
        return torch.cat(losses)


def _cross_entropy(rows: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(rows, weight).float(), targets, reduction="none")

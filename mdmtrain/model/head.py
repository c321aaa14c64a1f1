"""The output head, which computes logits only at masked positions.

Only some of the positions are masked, about half on average for most objectives. Their hidden states are gathered first
and then processed in chunks of a fixed size. The backward pass recomputes each chunk, so memory holds only one chunk of
[rows, vocabulary] logits. A compiled cross-entropy needs 4 bytes for each logit in bfloat16 instead of 12, so one chunk
can often hold all rows. The loop over chunks is inside one forward call, because all ranks must call an FSDP module
equally often, and the number of chunks differs between ranks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Head(nn.Module):
    """Linear map to the vocabulary. With tied embeddings it has no parameter; `forward` gets that of the embedding."""

    def __init__(self, d_model: int, vocab_size: int, tied: bool, chunk: int, fused: bool = False):
        super().__init__()
        self.chunk, self.fused = chunk, fused
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, d_model))
        self.cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] = cross_entropy

    def compile_loss(self) -> None:
        """Compile the cross-entropy. It then keeps the logits only in the compute dtype. One graph serves all K."""
        compiled = torch.compile(cross_entropy, fullgraph=True)

        def loss(rows: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
            if len(rows) < 2:  # the compiler would make separate graphs for 0 and 1
                return cross_entropy(rows, targets, weight)
            torch._dynamo.mark_dynamic(rows, 0)
            torch._dynamo.mark_dynamic(targets, 0)
            return compiled(rows, targets, weight)

        self.cross_entropy = loss

    def forward(self, rows: Tensor, targets: Tensor | None, tied_weight: Tensor | None) -> Tensor:
        """The cross-entropy in nats, float32 [K], or if targets is None the logits, float32 [K, vocab_size].

        rows: [K, d_model], the hidden states of the masked positions; K may be 0. targets: int64 [K] or None.
        tied_weight: the weight of the embedding [vocab_size, d_model] if it is tied, else None.
        """
        weight = self.weight if tied_weight is None else tied_weight
        assert weight is not None, "tied embeddings: the embedding's weight is missing"
        if targets is None:
            return F.linear(rows, weight).float()
        if self.fused:
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=self.chunk)
            return F.linear_cross_entropy(rows, weight, targets, reduction="none", options=options)
        if len(rows) <= self.chunk:  # with a single chunk, recomputation would save no memory
            return self.cross_entropy(rows, targets, weight)
        losses = [
            checkpoint(self.cross_entropy, r, t, weight, use_reentrant=False)
            for r, t in zip(rows.split(self.chunk), targets.split(self.chunk), strict=True)
        ]
        return torch.cat(losses)


def cross_entropy(rows: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """rows [K, d_model], targets int64 [K], weight [vocab_size, d_model] -> nats, float32 [K]."""
    return F.cross_entropy(F.linear(rows, weight).float(), targets, reduction="none")

"""A bidirectional pre-norm transformer that maps token ids to the cross-entropy of chosen positions.

Its block is that of Llama (RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases) without the causal
mask. The masking rate is not an input, because the number of mask tokens already shows it (arXiv 2406.03736).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mdmtrain.diffusion.objective import MaskedBatch
from mdmtrain.model.attention import Attention, Mask, attention_mask, rotary_angles
from mdmtrain.model.head import Head
from mdmtrain.model.presets import ModelShape


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: ModelShape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.up_proj = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.down_proj = nn.Linear(shape.d_ff, shape.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer. recompute: options of activation checkpointing, set by parallel/parallelize.py; None means off."""

    def __init__(self, shape: ModelShape):
        super().__init__()
        self.recompute: dict | None = None
        self.attention_norm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None) -> Tensor:
        if self.recompute is None or not torch.is_grad_enabled():
            return self._forward(x, cos, sin, mask)
        return checkpoint(self._forward, x, cos, sin, mask, use_reentrant=False, **self.recompute)

    def _forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """The denoiser. Parameter names are part of the checkpoint format."""

    set_requires_all_reduce: Callable[[bool], None]  # FSDPModule's: every model is sharded (parallel/parallelize.py)

    def __init__(self, shape: ModelShape, head_chunk: int, fused_head: bool = False):
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab_size, shape.d_model)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.norm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
        self.head = Head(shape.d_model, shape.vocab_size, shape.tied_embeddings, head_chunk, fused_head)

    def forward(
        self, ids: Tensor, positions: Tensor, targets: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """The cross-entropy of `targets` in nats, float32 [K], or without targets the logits, float32 [K, vocab_size].

        ids: int64 [B, L]. positions: int64 [K], the flat indices b * L + i of the positions that the head computes.
        targets: int64 [K] or None. segments: int [B, L] or None, see `attention_mask`.
        """
        cos, sin = rotary_angles(ids.shape[1], self.shape.head_dim, self.shape.rope_theta, ids.device)
        mask = attention_mask(segments, self.shape)
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        # The norm works on each position separately, so only the needed rows are normalised.
        rows = self.norm(x.flatten(0, 1).index_select(0, positions))
        return self.head(rows, targets, self.embed.weight if self.shape.tied_embeddings else None)


def masked_cross_entropy(
    model: Transformer, masked_batch: MaskedBatch, segments: Tensor | None, rows_per_slot: int
) -> Tensor:
    """The cross-entropy of each masked position, float32 [K]. segments: int32 [slots, L] on the host, or None."""
    if segments is not None:
        segments = segments.to(masked_batch.noisy.device, non_blocking=True)
        # After the copy, because a repeated tensor on the host would not be in pinned memory.
        segments = segments.unsqueeze(1).expand(-1, rows_per_slot, -1).flatten(0, 1)
    return model(masked_batch.noisy, masked_batch.positions, masked_batch.targets, segments)


def initial_std(name: str, shape: ModelShape) -> float | None:
    """The standard deviation of a parameter's initial values, or None if they are ones (norms).

    Outputs to the residual stream are scaled by 1/sqrt(2 n_layers), so that its variance does not grow with depth.
    """
    if "norm" in name:
        return None
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return shape.init_std / (2 * shape.n_layers) ** 0.5
    return shape.init_std

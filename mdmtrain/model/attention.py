"""Bidirectional multi-head attention with rotary positions and grouped key/value heads.

Rows of several documents or with pads carry a mask. On CUDA it is FlexAttention's: one block mask covers documents,
pads, causality and grouped heads in float32 and bfloat16, on torch 2.11 and 2.13, skips the blocks that no query
sees, and can be run on a CPU, where tests compare it. (varlen_attn takes half precision only, has no grouped heads in
2.11, and wants boundaries, whose number changes with every batch.) Elsewhere, SDPA with a boolean mask: the reference.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mdmtrain.model.presets import ModelShape

Mask = Tensor | BlockMask


@cache
def _compiled(function: Callable) -> Callable:
    """Not compiled, FlexAttention makes [.., L, L] tensors. Not at import: that takes seconds."""
    return torch.compile(function)


def takes_flex(device: torch.device, head_dim: int) -> bool:
    return device.type == "cuda" and head_dim >= 16  # where its kernels begin


def attention_mask(segments: Tensor | None, shape: ModelShape) -> Mask | None:
    """What queries may see, made once a batch; None: everything (a causal model: what came before).

    segments: int [B, L]; attention stays between equal values (pads have one of their own: no row of it is empty).
    """
    if segments is None:
        return None
    if takes_flex(segments.device, shape.head_dim):
        return block_mask(segments, shape.causal)
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    return mask & torch.ones_like(mask[:1]).tril() if shape.causal else mask


def block_mask(segments: Tensor, causal: bool) -> BlockMask:
    """The same for FlexAttention."""
    B, L = segments.shape

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = segments[b, q] == segments[b, k]
        return same & (k <= q) if causal else same

    return _compiled(create_block_mask)(visible, B, None, L, L, device=segments.device)


def rotary_angles(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles (arXiv 2104.09864), float32 [L, head_dim], halves repeated."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim/2) of x [B, heads, L, head_dim] by position, in float32 (Llama's layout)."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Every position sees every other one (a causal model: those before it), or those that `mask` allows."""

    def __init__(self, shape: ModelShape):
        super().__init__()
        self.head_dim = shape.head_dim
        self.causal = shape.causal
        self.grouped = shape.n_kv_heads != shape.n_heads
        self.q_proj = nn.Linear(shape.d_model, shape.n_heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.d_model, shape.n_kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.d_model, shape.n_kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.n_heads * shape.head_dim, shape.d_model, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None) -> Tensor:
        """x: [B, L, d_model]; mask: of `attention_mask` (a tensor: bool [B, 1, L, L]). Returns [B, L, d_model]."""
        B, L, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, L, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(B, L, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(B, L, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if isinstance(mask, BlockMask):
            flex: Callable = flex_attention  # a compiled block has it in its own graph
            if not torch.compiler.is_compiling():
                flex = _compiled(flex_attention)
            out = flex(q, k, v, block_mask=mask, enable_gqa=self.grouped)
        else:
            causal = self.causal and mask is None  # a mask says it already
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)
        return self.o_proj(out.transpose(1, 2).reshape(B, L, -1))

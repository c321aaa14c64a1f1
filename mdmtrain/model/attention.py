"""Bidirectional multi-head attention with rotary positions and grouped key/value heads.

Rows with several documents or with padding have a mask. On CUDA the mask is a block mask of FlexAttention. It supports
documents, padding, causality and grouped heads in float32 and bfloat16 on torch 2.11 and 2.13, skips blocks that no
query sees, and also runs on a CPU, where tests compare it with SDPA. (varlen_attn supports only half precision, has no
grouped heads in torch 2.11, and needs the boundaries of documents, whose number changes with each batch.) On other
devices the model uses SDPA with a boolean mask, which is the reference.
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
    """Compile a function of FlexAttention, which makes [.., L, L] tensors if it is not compiled.

    Called at first use and not at import, because it takes seconds.
    """
    return torch.compile(function)


def takes_flex(device: torch.device, head_dim: int) -> bool:
    return device.type == "cuda" and head_dim >= 16  # the smallest head of its kernels


def attention_mask(segments: Tensor | None, shape: ModelShape) -> Mask | None:
    """The attention mask of a batch, or None if every position sees all others (causal: all earlier ones).

    segments: int [B, L], or None. Positions see each other if their values are equal. Padding has its own value, so
    that no row of the mask is empty.
    """
    if segments is None:
        return None
    if takes_flex(segments.device, shape.head_dim):
        return block_mask(segments, shape.causal)
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    return mask & torch.ones_like(mask[:1]).tril() if shape.causal else mask


def block_mask(segments: Tensor, causal: bool) -> BlockMask:
    """The same mask for FlexAttention. segments: int [B, L]."""
    B, L = segments.shape

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = segments[b, q] == segments[b, k]
        return same & (k <= q) if causal else same

    return _compiled(create_block_mask)(visible, B, None, L, L, device=segments.device)


def rotary_angles(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles (arXiv 2104.09864), each float32 [L, head_dim] with two equal halves."""
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
    """Attention between all positions (in a causal model: to earlier ones), or between those that the mask allows."""

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
        """x: [B, L, d_model]. cos, sin: see `rotary_angles`. mask: see `attention_mask`; a tensor is bool [B, 1, L, L].

        Returns [B, L, d_model].
        """
        B, L, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, L, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(B, L, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(B, L, -1, self.head_dim).transpose(1, 2)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if isinstance(mask, BlockMask):
            flex: Callable = flex_attention  # a compiled block has it in its own graph
            if not torch.compiler.is_compiling():
                flex = _compiled(flex_attention)
            out = flex(q, k, v, block_mask=mask, enable_gqa=self.grouped)
        else:
            causal = self.causal and mask is None  # a mask includes causality already
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)
        return self.o_proj(out.transpose(1, 2).reshape(B, L, -1))

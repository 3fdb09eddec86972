"""Multi-head attention in one class, and the kernels that compute it."""

# B batch, T query positions, S key positions, N heads, K key-value heads, H head size, D model size

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txtrain.model.context import AnyContext
from txtrain.model.kernels import Kernel
from txtrain.model.mask import PreparedMask
from txtrain.model.position import Rotation


class MultiHeadAttention(nn.Module):
    """softmax(q k^T * scale + bias) v, heads side by side (Vaswani et al. 2017).

    n_kv_heads: all heads (MHA), one (MQA, Shazeer 2019, 1911.02150), or some (GQA, Ainslie et al. 2023, 2305.13245).
    window: see mask.py (Mistral, 2310.06825). softcap: softcap * tanh(score / softcap) before the mask (Gemma 2, 2408.00118).
    qk_norm: the model's norm over each head of q and k before the rotation (2302.05442). head_dim is free of dim.
    """

    residual_projections = ("o_proj",)

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        norm: Callable[[int], nn.Module],
        window: int | None = None,
        softcap: float | None = None,
        scale: float = 1.0,
        qk_norm: bool = False,
        bias: bool = False,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.window = window
        self.softcap = softcap
        self.scale = scale
        self.dropout = attention_dropout
        self.q_proj = nn.Linear(dim, n_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, n_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, n_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(n_heads * head_dim, dim, bias=bias)
        self.q_norm = norm(head_dim) if qk_norm else None
        self.k_norm = norm(head_dim) if qk_norm else None

    def forward(self, x_BTD: Tensor, context: AnyContext) -> Tensor:
        q_BNTH = self._heads(self.q_proj(x_BTD))
        if self.q_norm is not None:
            q_BNTH = self.q_norm(q_BNTH)
        if context.rotation is not None:
            q_BNTH = context.rotation(q_BNTH)
        k_BKSH, v_BKSH = context.attended(x_BTD, partial(self._keys_and_values, rotation=context.rotation))
        dropout = self.dropout if self.training else 0.0
        y_BNTH = attend(q_BNTH, k_BKSH, v_BKSH, context.mask, self.scale, self.softcap, dropout)
        return self.o_proj(y_BNTH.transpose(1, 2).flatten(-2))

    def _keys_and_values(self, x_BSD: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        k_BKSH = self._heads(self.k_proj(x_BSD))
        if self.k_norm is not None:
            k_BKSH = self.k_norm(k_BKSH)
        return (k_BKSH if rotation is None else rotation(k_BKSH)), self._heads(self.v_proj(x_BSD))

    def _heads(self, x_BTE: Tensor) -> Tensor:
        return x_BTE.view(*x_BTE.shape[:2], -1, self.head_dim).transpose(1, 2)


def attend(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: PreparedMask, scale: float, softcap: float | None, dropout: float) -> Tensor:
    """[B, N, T, H]. The kernel was chosen with the mask (`kernels.choose_kernel`); all of them equal `plain`, gradients included."""
    return KERNELS[mask.kernel](q_BNTH, k_BKSH, v_BKSH, mask, scale, softcap, dropout)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask, scale: float, softcap: float | None, dropout: float) -> Tensor:
    """The formula, and the reference for all other kernels."""
    B, _, T, H = q.shape
    grouped = q.reshape(B, k.shape[1], -1, T, H)  # [B, K, N / K, T, H]: a group of query heads reads one key-value head, without copying it
    scores = grouped @ k[:, :, None].transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.flatten(1, 2)
    if mask.bias is not None:
        scores = scores + mask.bias
    if mask.visible is not None:
        scores = scores.masked_fill(~mask.visible, torch.finfo(scores.dtype).min)
    p = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if mask.visible is not None and mask.declared.may_see_nothing:
        p = p.masked_fill(~mask.visible, 0.0)  # the minimum spread it evenly
    p = F.dropout(p.to(v.dtype), dropout)
    return (p.view(B, k.shape[1], -1, T, p.shape[-1]) @ v[:, :, None]).flatten(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask, scale: float, softcap: float | None, dropout: float) -> Tensor:
    causal = mask.declared.causal and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def sdpa_masked(q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask, scale: float, softcap: float | None, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask.additive, dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@lru_cache
def _flex() -> Callable[..., Any]:
    """Compiled once a process: uncompiled flex attention draws the whole score matrix."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask, scale: float, softcap: float | None, dropout: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    bias = mask.bias

    def modify(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if softcap is not None:
            score = torch.tanh(score / softcap) * softcap
        if bias is not None:
            score = score + bias[b if bias.shape[0] > 1 else 0, h, t, s]
        return score

    modified = modify if softcap is not None or bias is not None else None
    kernel: Any = _flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    out: Tensor = kernel(q, k, v, score_mod=modified, block_mask=mask.blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out


def varlen(q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask, scale: float, softcap: float | None, dropout: float) -> Tensor:
    """All documents of the batch laid end to end: no work is done across their borders."""
    from torch.nn.attention.varlen import varlen_attn

    def flat(x_BNTH: Tensor) -> Tensor:
        return x_BNTH.transpose(1, 2).flatten(0, 1)

    window = (-1 if mask.declared.window is None else mask.declared.window - 1, 0)
    length = q.shape[2]
    gqa = q.shape[1] != k.shape[1]
    assert mask.offsets is not None
    padded = v if v.shape[-1] == q.shape[-1] else F.pad(v, (0, q.shape[-1] - v.shape[-1]))  # the kernel wants heads of one size
    out: Any = varlen_attn(flat(q), flat(k), flat(padded), mask.offsets, mask.offsets, length, length, scale=scale, window_size=window, enable_gqa=gqa)
    return out.view(q.shape[0], length, *out.shape[1:]).transpose(1, 2)[..., : v.shape[-1]]


KERNELS: dict[Kernel, Callable[..., Tensor]] = {
    "plain": plain,
    "sdpa": sdpa,
    "sdpa_masked": sdpa_masked,
    "flex": flex,
    "varlen": varlen,
}

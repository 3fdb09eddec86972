"""The kernels that compute attention; kernel_choice.py says which."""

# B batch, T query positions, S key positions, N heads, K key-value heads, H head size

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from txtrain.model.attention.kernel_choice import Kernel
from txtrain.model.attention.mask import PreparedMask


def attend(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: PreparedMask, scale: float, softcap: float | None, dropout: float) -> Tensor:
    """[B, N, T, H]. The kernel was chosen with the mask (`kernel_choice.choose_kernel`); all of them equal `plain`, gradients included."""
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

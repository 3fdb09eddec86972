"""The kernels that compute attention; kernel_choice.py chooses one. All of them equal `plain`, gradients included."""

# B batch, T query positions, S key positions, N heads, K key-value heads, H head size

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from txtrain.ground.native import use_own_compiler_cache
from txtrain.model.attention.blocks import blocked, in_autocast, of_one_size
from txtrain.model.attention.mask import PreparedMask


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask, scale: float, softcap: float | None, dropout: float
) -> Tensor:
    """[B, N, T, H], from q [B, N, T, H] and k, v [B, K, S, H], by the kernel that the mask was prepared for."""
    return KERNELS[mask.kernel](q, k, v, mask, scale, softcap, dropout)


def plain(
    q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask, scale: float, softcap: float | None, dropout: float
) -> Tensor:
    """The formula, and the reference for all other kernels."""
    B, _, T, H = q.shape
    grouped = q.reshape(B, k.shape[1], -1, T, H)  # [B, K, N / K, T, H]: K groups of query heads
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
        p = p.masked_fill(~mask.visible, 0.0)  # a row of minima has equal probabilities
    p = F.dropout(p.to(v.dtype), dropout)
    return (p.view(B, k.shape[1], -1, T, p.shape[-1]) @ v[:, :, None]).flatten(1, 2)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask, scale: float, softcap: float | None, dropout: float
) -> Tensor:
    causal = mask.kernel == "sdpa" and mask.declared.causal
    if q.shape[2] == 1:  # a statement: an `and` with a compiled graph's symbolic length would itself be a symbol
        causal = False
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask.additive, dropout, causal, scale=scale, enable_gqa=gqa)


@lru_cache
def _compiled_flex() -> Callable[..., Any]:
    """Uncompiled flex attention materialises the whole score matrix."""
    from torch.nn.attention.flex_attention import flex_attention

    use_own_compiler_cache()
    return torch.compile(flex_attention, dynamic=False)


def flex(
    q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask, scale: float, softcap: float | None, dropout: float
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    bias = mask.bias

    def modify(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if softcap is not None:
            score = torch.tanh(score / softcap) * softcap
        return score if bias is None else score + bias[b if bias.shape[0] > 1 else 0, h, t, s]

    modified = modify if softcap is not None or bias is not None else None
    kernel: Any = _compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    gqa = q.shape[1] != k.shape[1]
    return kernel(q, k, v, score_mod=modified, block_mask=mask.blocks, scale=scale, enable_gqa=gqa)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask, scale: float, softcap: float | None, dropout: float
) -> Tensor:
    """All documents of the batch end to end: no work is done across their borders."""
    from torch.nn.attention.varlen import varlen_attn

    window = (-1 if mask.declared.window is None else mask.declared.window - 1, 0)
    length, gqa = q.shape[2], q.shape[1] != k.shape[1]
    given: Any = [x.transpose(1, 2).flatten(0, 1) for x in of_one_size(*in_autocast(q, k, v))]
    given += [mask.offsets, mask.offsets, length, length]
    out: Any = varlen_attn(*given, scale=scale, window_size=window, enable_gqa=gqa)
    return out.view(q.shape[0], length, *out.shape[1:]).transpose(1, 2)[..., : v.shape[-1]]


def blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask, scale: float, softcap: float | None, dropout: float
) -> Tensor:
    return blocked(q, k, v, mask, scale, softcap)


KERNELS = {"plain": plain, "sdpa": sdpa, "sdpa_masked": sdpa, "blocks": blocks, "flex": flex, "varlen": varlen}

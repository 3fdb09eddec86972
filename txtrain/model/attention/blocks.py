"""Attention by blocks of queries, for the CPU, where torch has no sparse kernel with a backward.

A block reads the keys from the first to the last one that any of its queries may see:

    window 3, blocks of 4       the time of a token depends on the window, not on the length
        x . . . | . . . .
        x x . . | . . . .       softcaps: scores of one block at a time exist, and the backward computes them again
        x x x . | . . . .
        . x x x | . . . .       documents: keys before the first document of the block are left out
        --------+--------
        . . x x | x . . .
"""

# B batch, T query positions, S key positions of a block, N heads, K key-value heads, H head size

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from txtrain.model.attention.mask import Block, Mask

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _visible(mask: Mask, block: Block, device: torch.device) -> Tensor:
    """[B or 1, 1, T, S]."""
    k = torch.arange(block.begin, block.last, device=device)
    q = k[block.first - block.begin :, None]
    seen = (q >= k)[None, None]
    if mask.window is not None:
        seen = seen & (q - mask.window < k)
    if mask.documents_BS is not None:
        documents = mask.documents_BS
        seen = seen & (documents[:, None, block.queries, None] == documents[:, None, None, block.keys])
    return seen if mask.valid_BS is None else seen & mask.valid_BS[:, None, None, block.keys]


def _additive(mask: Mask, block: Block, like: Tensor) -> Tensor:
    """0 where visible, else minus infinity, [B or 1, 1, T, S]."""
    seen = _visible(mask, block, like.device)
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)


def blocked(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, blocks: tuple[Block, ...], scale: float, softcap: float | None
) -> Tensor:
    """[B, N, T, H], from q [B, N, T, H] and k, v [B, K, T, H]."""
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) for x in (q, k, v))
    size = v.shape[-1]
    if softcap is None and size != k.shape[-1]:  # the kernel wants heads of one size
        v = F.pad(v, (0, k.shape[-1] - size))
    out: Tensor = (_Flash if softcap is None else _Capped).apply(q, k, v, mask, blocks, scale, softcap)
    return out if out.shape[-1] == size else out[..., :size]


class _Flash(torch.autograd.Function):
    """torch's flash kernel for each block."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, blocks: tuple[Block, ...], scale: float, softcap: None
    ) -> Tensor:
        out = _empty_like(q, q.shape[-1])
        sums = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
        for block, rows, keys, values in _parts(blocks, q, k, v):
            added = _additive(mask, block, q)
            made, log_sums = _flash(rows, keys, values, 0.0, False, attn_mask=added, scale=scale)
            out[:, :, block.queries], sums[:, :, block.queries] = made, log_sums
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.mask, ctx.blocks, ctx.scale = mask, blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block, rows, keys, values in _parts(ctx.blocks, q, k, v):
            at, added = block.queries, _additive(ctx.mask, block, q)
            made, log_sums = out[:, :, at], sums[:, :, at]
            of_rows, of_keys, of_values = _flash_backward(
                gradient[:, :, at], rows, keys, values, made, log_sums, 0.0, False, attn_mask=added, scale=ctx.scale
            )
            of_q[:, :, at] = of_rows
            of_k[:, :, block.keys] += of_keys
            of_v[:, :, block.keys] += of_values
        return of_q, of_k, of_v, None, None, None, None


class _Capped(torch.autograd.Function):
    """The plain formula for each block, whose scores are computed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, blocks: tuple[Block, ...], scale: float, softcap: float
    ) -> Tensor:
        out = _empty_like(q, v.shape[-1])
        for block, rows, keys, values in _parts(blocks, q, k, v):
            p, _ = _probabilities(rows, keys, mask, block, scale, softcap)
            out[:, :, block.queries] = (p.to(v.dtype) @ values[:, :, None]).flatten(1, 2)
        ctx.save_for_backward(q, k, v, out)
        ctx.mask, ctx.blocks, ctx.scale, ctx.softcap = mask, blocks, scale, softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block, rows, keys, values in _parts(ctx.blocks, q, k, v):
            at = block.queries
            p, squashed = _probabilities(rows, keys, ctx.mask, block, ctx.scale, ctx.softcap)
            given = gradient[:, :, at]
            inner = (given * out[:, :, at]).sum(-1, keepdim=True, dtype=p.dtype).view(*p.shape[:-1], 1)
            given = _grouped(given, k.shape[1])
            of_v[:, :, block.keys] += (p.to(v.dtype).transpose(-1, -2) @ given).sum(2)
            of_p = (given @ values[:, :, None].transpose(-1, -2)).to(p.dtype)
            slope = squashed.square_().neg_().add_(1)  # of tanh
            of_scores = of_p.sub_(inner).mul_(p).mul_(slope).mul_(ctx.scale).to(q.dtype)
            of_q[:, :, at] = (of_scores @ keys[:, :, None]).flatten(1, 2)
            of_k[:, :, block.keys] += (of_scores.transpose(-1, -2) @ _grouped(rows, k.shape[1])).sum(2)
        return of_q, of_k, of_v, None, None, None, None


def _empty_like(q: Tensor, size: int) -> Tensor:
    """[B, N, T, H], laid out as [B, T, N, H]: the heads of a token are then side by side without a copy."""
    B, N, T, _ = q.shape
    return q.new_empty(B, T, N, size).transpose(1, 2)


def _parts(
    blocks: tuple[Block, ...], q: Tensor, k: Tensor, v: Tensor
) -> Iterator[tuple[Block, Tensor, Tensor, Tensor]]:
    for block in blocks:
        yield block, q[:, :, block.queries], k[:, :, block.keys], v[:, :, block.keys]


def _grouped(x: Tensor, n_kv_heads: int) -> Tensor:
    """[B, N, T, H] as [B, K, N / K, T, H]."""
    return x.unflatten(1, (n_kv_heads, -1))


def _probabilities(
    rows: Tensor, keys: Tensor, mask: Mask, block: Block, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """softmax of the capped scores, and tanh of the scores over the cap, [B, K, N / K, T, S], at least in float32."""
    scores = _grouped(rows, keys.shape[1]) @ keys[:, :, None].transpose(-1, -2)
    squashed = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scale / softcap).tanh_()
    hidden = ~_visible(mask, block, rows.device)[:, :, None]
    p = (squashed * softcap).masked_fill_(hidden, torch.finfo(squashed.dtype).min).softmax(-1)
    return (p.masked_fill_(hidden, 0.0) if mask.may_see_nothing else p), squashed

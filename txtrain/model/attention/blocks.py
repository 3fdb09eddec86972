"""Attention by blocks of queries, for the CPU, where torch has no sparse kernel with a backward.

A block reads the keys from the first to the last one that any of its queries may see:

    window 3, blocks of 4       the time of a token depends on the window, not on the length
        x . . . | . . . .
        x x . . | . . . .       softcaps, learned biases: the plain formula for a piece of a block at a time, whose
        x x x . | . . . .       scores the backward computes again
        . x x x | . . . .       documents: keys before the first document of the block are left out
        --------+--------
        . . x x | x . . .
"""

# B batch, T query positions, S key positions of a block, N heads, K key-value heads, H head size

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from txtrain.model.attention.kernel_choice import together
from txtrain.model.attention.mask import Block, Mask, PreparedMask

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _additive(mask: Mask, block: Block, like: Tensor) -> Tensor:
    """0 where visible, else minus infinity, [B or 1, 1, T, S]."""
    seen = mask.visible(like.device, block)
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)


def blocked(
    q: Tensor, k: Tensor, v: Tensor, prepared: PreparedMask, scale: float, softcap: float | None
) -> Tensor:
    """[B, N, T, H], from q [B, N, T, H] and k, v [B, K, T, H]."""
    q, k, v = in_autocast(q, k, v)
    size, mask, bias = v.shape[-1], prepared.declared, prepared.bias
    if softcap is not None or bias is not None:
        made: Tensor = _Pieces.apply(q, k, v, bias, mask, prepared.blocks, scale, softcap)
        return made
    out: Tensor = _Flash.apply(*of_one_size(q, k, v), mask, prepared.blocks, scale)
    return out if out.shape[-1] == size else out[..., :size]


def in_autocast(*given: Tensor) -> list[Tensor]:
    """In autocast's dtype if it is on, for kernels without a rule of their own: norms give q and k in float32."""
    device = given[0].device.type
    if not torch.is_autocast_enabled(device):
        return [*given]
    return [x.to(torch.get_autocast_dtype(device)) for x in given]


def of_one_size(*given: Tensor) -> list[Tensor]:
    """q, k, v for kernels that want heads of one size: zeros of q and k leave the scores, those of v are cut off."""
    size = max(x.shape[-1] for x in given)
    return [x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1])) for x in given]


class _Flash(torch.autograd.Function):
    """torch's flash kernel for each block."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, blocks: tuple[Block, ...], scale: float
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
        return of_q, of_k, of_v, None, None, None


class _Pieces(torch.autograd.Function):
    """The plain formula for a piece at a time, whose scores the backward computes again: softcaps, learned biases."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Mask, blocks: tuple[Block, ...],
        scale: float, softcap: float | None,
    ) -> Tensor:
        out = _empty_like(q, v.shape[-1])
        ctx.how = mask, blocks, scale, softcap
        how = (bias, *ctx.how)
        for piece, hidden in _pieces(q, k, how):
            # p without a name, which would hold these scores while those of the next piece are made.
            piece.set(
                out,
                _probabilities(piece.rows(q), piece.keys(k), piece, hidden, how)[0].flatten(2, 3).to(v.dtype)
                @ piece.keys(v),
            )
        ctx.save_for_backward(q, k, v, out, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, bias = ctx.saved_tensors
        how = (bias, *ctx.how)
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        of_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        for piece, hidden in _pieces(q, k, how):
            _add_gradients(piece, hidden, how, (q, k, v, out, gradient), (of_q, of_k, of_v, of_bias))
        return of_q, of_k, of_v, of_bias, None, None, None, None


def _add_gradients(piece: _Piece, hidden: Tensor | None, how: Any, given: Any, gradients: Any) -> None:
    """A piece's share of `gradients`. A function: its scores are gone before those of the next piece are made."""
    (q, k, v, out, gradient), (of_q, of_k, of_v, of_bias) = given, gradients
    rows, keys = piece.rows(q), piece.keys(k)
    p, squashed = _probabilities(rows, keys, piece, hidden, how)
    of_rows, p = piece.rows(gradient), p.flatten(2, 3)
    inner = (of_rows * piece.rows(out)).sum(-1, keepdim=True, dtype=p.dtype)
    piece.keys(of_v).add_(p.to(v.dtype).mT @ of_rows)
    of_scores = (of_rows @ piece.keys(v).mT).to(p.dtype).sub_(inner).mul_(p)
    if of_bias is not None:
        made = piece.split(of_scores).flatten(1, 2)
        piece.of(of_bias).add_(made if len(made) == 1 or len(of_bias) > 1 else made.sum(0, keepdim=True))
    if squashed is not None:
        of_scores.mul_(squashed.square_().neg_().add_(1))  # the slope of tanh
    of_scores = of_scores.mul_(how[3]).to(q.dtype)
    piece.set(of_q, of_scores @ keys)
    piece.keys(of_k).add_(of_scores.mT @ rows)


class _Piece(NamedTuple):
    """Rows of the batch, key heads and queries. n_shared: heads of queries for each head of keys."""

    rows_of_batch: slice
    kv_heads: slice
    block: Block
    n_shared: int

    @property
    def heads(self) -> slice:
        return slice(self.kv_heads.start * self.n_shared, self.kv_heads.stop * self.n_shared)

    def rows(self, x_BNTH: Tensor) -> Tensor:
        """[b, k, heads of queries one after another * T, H]."""
        x = x_BNTH[self.rows_of_batch, self.heads, self.block.queries]
        return x.unflatten(1, (-1, self.n_shared)).flatten(2, 3)

    def set(self, out_BNTH: Tensor, made: Tensor) -> None:
        part = out_BNTH[self.rows_of_batch, self.heads, self.block.queries]
        part.copy_(made.view(part.shape))

    def keys(self, x_BKSH: Tensor) -> Tensor:
        return x_BKSH[self.rows_of_batch, self.kv_heads, self.block.keys]

    def of(self, x_BNTS: Tensor) -> Tensor:
        """Its scores' part of a bias."""
        rows = self.rows_of_batch if len(x_BNTS) > 1 else slice(None)
        return x_BNTS[rows, self.heads, self.block.queries, self.block.keys]

    def split(self, scores: Tensor) -> Tensor:
        """[b, k, n_shared, T, S]."""
        return scores.unflatten(2, (self.n_shared, -1))


def _pieces(q: Tensor, k: Tensor, how: Any) -> Iterator[tuple[_Piece, Tensor | None]]:
    """Of each block so many rows and heads that their scores stay in a core's cache; compiled all.
    Beside it where scores are hidden, [b or 1, 1, 1, T, S]."""
    _, mask, blocks, _, _ = how
    (B, N), K = q.shape[:2], k.shape[1]
    for block in blocks:
        n_scores = N // K * (block.last - block.first) * (block.end - block.begin)
        rows, heads = (B, K) if torch.compiler.is_compiling() else together(n_scores, B, K)
        hidden = None if mask.sees_all else ~mask.visible(q.device, block)[:, :, None]
        for b in range(0, B, rows):
            mine = hidden if hidden is None or len(hidden) == 1 else hidden[b : b + rows]
            for h in range(0, K, heads):
                yield _Piece(slice(b, b + rows), slice(h, min(h + heads, K)), block, N // K), mine


def _probabilities(
    rows: Tensor, keys: Tensor, piece: _Piece, hidden: Tensor | None, how: Any
) -> tuple[Tensor, Tensor | None]:
    """softmax of the scores [b, k, n_shared, T, S], at least in float32, and under a softcap their tanh."""
    bias, mask, _, scale, softcap = how
    # Not `@`: selective checkpointing keeps what that returns, and here it is changed in place.
    given, alpha = (rows.flatten(0, 1), keys.flatten(0, 1).mT), scale if softcap is None else scale / softcap
    scores = torch.baddbmm(rows.new_empty(1, 1, 1), *given, beta=0, alpha=alpha).view(*rows.shape[:3], -1)
    scores, squashed = scores.to(torch.promote_types(scores.dtype, torch.float32)), None
    if softcap is not None:
        squashed = scores.tanh_()
        scores = squashed * softcap
    scores = piece.split(scores)
    if bias is not None:
        scores.add_(piece.of(bias).unflatten(1, (-1, piece.n_shared)))
    if hidden is None:
        return scores.softmax(-1), squashed
    p = scores.masked_fill_(hidden, torch.finfo(scores.dtype).min).softmax(-1)
    return (p.masked_fill_(hidden, 0.0) if mask.may_see_nothing else p), squashed


def _empty_like(q: Tensor, size: int) -> Tensor:
    """[B, N, T, H], laid out as [B, T, N, H]: the heads of a token are then side by side without a copy."""
    B, N, T, _ = q.shape
    return q.new_empty(B, T, N, size).transpose(1, 2)


def _parts(
    blocks: tuple[Block, ...], q: Tensor, k: Tensor, v: Tensor
) -> Iterator[tuple[Block, Tensor, Tensor, Tensor]]:
    for block in blocks:
        yield block, q[:, :, block.queries], k[:, :, block.keys], v[:, :, block.keys]

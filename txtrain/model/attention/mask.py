"""Attention masks: declared, and materialised for the kernels that need that (kernel_choice.py).

    causal        i sees j <= i                    window w     i sees j with |i - j| < w
    documents     i sees its own document          padding      no position sees a padding token
    prefix        every position sees it (prefix LM)

        causal            causal, window 3       causal, documents 0 0 1 1
        x . . . .         x . . . .              x . . .
        x x . . .         x x . . .              x x . .
        x x x . .         x x x . .              . . x .
        x x x x .         . x x x .              . . x x
        x x x x x         . . x x x

A mask is materialised, [B or 1, 1 or N, T, S], once for all layers that share it. The output of a position that sees
nothing is 0, never NaN.
"""

# B batch, T query positions, S key positions (in self-attention the last T of them are the queries'), N heads

from __future__ import annotations

import dataclasses as dc
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from txtrain.model.attention.kernel_choice import BLOCK, Declared, Kernel


@dc.dataclass(frozen=True)
class Mask(Declared):
    """`Declared`, with the tensors of a batch."""

    documents_BS: Tensor | None = None
    valid_BS: Tensor | None = None
    prefix_BS: Tensor | None = None
    query_documents_BT: Tensor | None = None

    def windowed(self, window: int | None, n_keys: int) -> Mask:
        """The mask of a layer with that window, whose cache holds the last n_keys keys."""
        valid = None if self.valid_BS is None else self.valid_BS[:, -n_keys:]
        return dc.replace(self, window=window, n_keys=n_keys, valid_BS=valid)

    @property
    def shift(self) -> int:
        """Position of the first query among the keys."""
        return max(self.n_keys - self.n_queries, 0)

    @property
    def documents_of_queries(self) -> Tensor:
        assert self.documents_BS is not None
        return self.documents_BS[:, -self.n_queries :] if self.query_documents_BT is None else self.query_documents_BT

    def visible(self, device: torch.device, block: Block | None = None) -> Tensor:
        """True where query t (of a block, or of all) may see key s, [B or 1, 1, T, S]."""
        block = Block(0, self.n_queries, 0, self.n_keys) if block is None else block
        k = torch.arange(block.begin, block.end, device=device)
        q = torch.arange(block.first, block.last, device=device)[:, None] + self.shift
        seen = ((q >= k) if self.causal else torch.ones_like(q + k, dtype=torch.bool))[None, None]
        if self.prefix_BS is not None:
            seen = seen | self.prefix_BS[:, None, None, block.keys]
        if self.window is not None:
            seen = seen & ((q - k).abs() < self.window)
        if self.documents_BS is not None:
            of_queries = self.documents_of_queries[:, None, block.queries, None]
            seen = seen & (of_queries == self.documents_BS[:, None, None, block.keys])
        if self.valid_BS is not None:
            seen = seen & self.valid_BS[:, None, None, block.keys]
        return seen


@dc.dataclass(frozen=True)
class PreparedMask:
    """A mask with what its kernel reads."""

    declared: Mask
    kernel: Kernel
    bias: Tensor | None = None  # plain, blocks, flex: added to the scores, [B or 1, N, T, S]
    visible: Tensor | None = None  # plain: boolean, [B or 1, 1, T, S]
    additive: Tensor | None = None  # sdpa_masked: in the scores' dtype, -inf where invisible; it carries the bias too
    blocks: Any = None  # flex: a BlockMask; blocks: `blocks_of`
    offsets: Tensor | None = None  # varlen: `document_offsets`


def prepare(
    mask: Mask, kernel: Kernel, bias: Tensor | None, device: torch.device, dtype: torch.dtype, varying: bool = True
) -> PreparedMask:
    """varying: what is no tensor may depend on the batch; not if the kernel is compiled, for which it is constant."""
    bias = None if bias is None else bias.to(dtype)
    if kernel == "blocks":
        bias = None if bias is None else bias.contiguous()
        return PreparedMask(mask, kernel, bias=bias, blocks=blocks_of(mask, varying))
    if kernel == "flex":
        return PreparedMask(mask, kernel, bias=bias, blocks=block_mask(mask, device))
    if kernel in ("sdpa", "varlen"):
        return PreparedMask(mask, kernel, offsets=document_offsets(mask) if kernel == "varlen" else None)
    visible = None if mask.sees_all else mask.visible(device)
    if kernel == "plain":
        return PreparedMask(mask, kernel, bias=bias, visible=visible)
    if visible is None:
        return PreparedMask(mask, kernel, additive=bias)
    # Drawn in numbers once: of a boolean mask SDPA would make numbers in every layer.
    scores = torch.zeros(visible.shape, dtype=dtype, device=device) if bias is None else bias
    return PreparedMask(mask, kernel, additive=scores.masked_fill(~visible, -torch.inf))


class Block(NamedTuple):
    """Queries `first` to before `last`, which see keys from `begin` to before `end`."""

    first: int
    last: int
    begin: int
    end: int

    @property
    def queries(self) -> slice:
        return slice(self.first, self.last)

    @property
    def keys(self) -> slice:
        return slice(self.begin, self.end)


def blocks_of(mask: Mask, by_documents: bool) -> tuple[Block, ...]:
    """by_documents: leave out keys by documents too; then the blocks depend on the batch."""
    firsts = range(0, mask.n_queries, BLOCK)
    begins = [0 if mask.window is None else max(0, first - mask.window + 1) for first in firsts]
    if by_documents and mask.documents_BS is not None:
        starts = document_starts(mask.documents_BS) * torch.arange(mask.n_keys, device=mask.documents_BS.device)
        of_blocks = starts.cummax(1).values[:, ::BLOCK].amin(0).tolist()
        begins = [max(pair) for pair in zip(begins, of_blocks, strict=True)]
    blocks = []
    for first, begin in zip(firsts, begins, strict=True):
        last = min(first + BLOCK, mask.n_queries)
        reach = mask.n_keys if mask.window is None else min(mask.n_keys, last + mask.window - 1)
        blocks.append(Block(first, last, begin, last if mask.causal else reach))
    return tuple(blocks)


def block_mask(mask: Mask, device: torch.device) -> Any:
    """Flex attention's BlockMask: a function of indices, and the blocks of 128 x 128 with a visible entry."""
    from torch.nn.attention.flex_attention import create_block_mask

    shift, documents, valid, prefix = mask.shift, mask.documents_BS, mask.valid_BS, mask.prefix_BS
    query_documents = None if documents is None else mask.documents_of_queries

    def seen(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        q = t + shift
        ok = (q >= s) if mask.causal else (s >= 0)
        if prefix is not None:
            ok = ok | prefix[b, s]
        if mask.window is not None:
            ok = ok & ((q - s).abs() < mask.window)
        if documents is not None and query_documents is not None:
            ok = ok & (query_documents[b, t] == documents[b, s])
        return ok if valid is None else ok & valid[b, s]

    batch = next((len(x) for x in (documents, valid, prefix) if x is not None), None)
    return create_block_mask(seen, batch, None, mask.n_queries, mask.n_keys, device=device)


def document_starts(documents_BT: Tensor) -> Tensor:
    """True where a document starts, [B, T]."""
    return F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0), value=True)


def document_offsets(mask: Mask) -> Tensor:
    """Where each document starts in the flattened batch, and the end, int32: the `cu_seqlens` of flash attention."""
    assert mask.documents_BS is not None
    starts = document_starts(mask.documents_BS).flatten().nonzero().flatten()
    return F.pad(starts, (0, 1), value=mask.documents_BS.numel()).to(torch.int32)

"""Blocks of one kind, and what they share: masks, positions, caches."""

# B batch, T query positions, S key positions, D model size

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from txtrain.model.attention.cache import Cache
from txtrain.model.attention.kernel_choice import choose_kernel
from txtrain.model.attention.mask import Mask, PreparedMask, prepare
from txtrain.model.block import CrossBlock
from txtrain.model.context import Context, MemoryContext
from txtrain.model.position.encodings import Position


@dc.dataclass(frozen=True)
class Given:
    """What is known of the tokens that a stack reads: None where there is nothing to know.

    distances_BS: positions of all keys, past ones too, of which the differences are distances, [B or 1, S].
    """

    position_ids_BT: Tensor
    distances_BS: Tensor
    valid_BS: Tensor | None = None
    documents_BS: Tensor | None = None
    prefix_BS: Tensor | None = None
    grid: tuple[int, int] | None = None

    def first(self, n: int) -> Given:
        """Of the first n tokens alone, where nothing is cached."""
        valid, documents, prefix = (None if x is None else x[:, :n] for x in (self.valid_BS, self.documents_BS, self.prefix_BS))
        return Given(self.position_ids_BT[:, :n], self.distances_BS[:, :n], valid, documents, prefix, self.grid)


@dc.dataclass
class Record:
    """What the blocks leave behind: their statistics, by the block's name. loss_scale: of their auxiliary losses, see context.py."""

    statistics: dict[str, Tensor] = dc.field(default_factory=dict)
    loss_scale: Tensor | None = None  # made where the first block computes

    def scale_on(self, device: torch.device) -> Tensor:
        if self.loss_scale is None:
            self.loss_scale = torch.ones((), device=device)
        return self.loss_scale

    def has(self, kind: str) -> bool:
        return any(name.rpartition(".")[2] == kind for name in self.statistics)

    def keep(self, block: str, statistics: dict[str, Tensor]) -> None:
        self.statistics.update({f"{block}.{name}": value for name, value in statistics.items()})


@dc.dataclass(frozen=True)
class Memory:
    """Another stack's output, for cross-attention; output_BSD is None where the cache has what it needs of it."""

    output_BSD: Tensor | None
    length: int
    valid_BS: Tensor | None = None
    documents_BS: Tensor | None = None


class Stack(nn.Module):
    """Position, blocks and final norm."""

    def __init__(self, position: Position, blocks: Sequence[nn.Module], final_norm: nn.Module | None, causal: bool, output_dropout: float = 0.0) -> None:
        super().__init__()
        self.position = position
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = final_norm
        self.causal = causal
        self.output_dropout = nn.Dropout(output_dropout)

    def new_cache(self) -> Cache:
        windows = [_needs(block.attention)[0] for block in self.blocks]
        return Cache(windows, with_memory=isinstance(self.blocks[0], CrossBlock))

    def run(
        self, x_BTD: Tensor, given: Given, cache: Cache | None = None, memory: Memory | None = None, record: Record | None = None, name: str = ""
    ) -> Tensor:
        """[B, T, D] through all blocks and the final norm. name: a prefix for the record."""
        blocks = {f"{name}blocks.{i}": block for i, block in enumerate(self.blocks)}
        x_BTD = self.through(blocks, x_BTD, given, cache, memory, record)
        x_BTD = x_BTD if self.final_norm is None else self.final_norm(x_BTD)
        return self.output_dropout(x_BTD)

    def through(
        self,
        blocks: Mapping[str, nn.Module],
        x_BTD: Tensor,
        given: Given,
        cache: Cache | None = None,
        memory: Memory | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """[B, T, D] through blocks, by their names in the record, that share masks and positions."""
        declared = Mask(x_BTD.shape[1], given.distances_BS.shape[1], self.causal, None, given.documents_BS, given.valid_BS, given.prefix_BS)
        rotation = self.position.rotation(given.position_ids_BT, x_BTD.dtype)
        masks: dict[tuple[Any, ...], PreparedMask] = {}
        crossed: dict[tuple[Any, ...], PreparedMask] = {}
        for i, (name, block) in enumerate(blocks.items()):
            layer_cache = cache.layers[i] if cache is not None else None
            n_keys = declared.n_keys if layer_cache is None else layer_cache.n_held + declared.n_queries
            key = (*_needs(block.attention), n_keys)
            if key not in masks:
                masks[key] = self._prepared(declared, *key, x_BTD, given.distances_BS)
            statistics: dict[str, Tensor] = {}
            across = None if memory is None else self._across(block, memory, cache.memories[i] if cache is not None else None, declared, x_BTD, given, crossed)
            loss_scale = None if record is None else record.scale_on(x_BTD.device)
            x_BTD = block(x_BTD, context=Context(masks[key], rotation, layer_cache, across, statistics, loss_scale))
            if record is not None:
                record.keep(name, statistics)
        return x_BTD

    def _prepared(
        self, declared: Mask, window: int | None, softcap: bool, dropout: bool, n_keys: int, x_BTD: Tensor, distances_BS: Tensor
    ) -> PreparedMask:
        mask = declared.windowed(window, n_keys)
        distances_BS = distances_BS[:, -n_keys:]
        bias = self.position.bias(distances_BS[:, -mask.n_queries :], distances_BS)
        return _with_kernel(mask, bias, softcap, dropout, x_BTD)

    def _across(
        self, block: nn.Module, memory: Memory, cache: Any, declared: Mask, x_BTD: Tensor, given: Given, masks: dict[tuple[Any, ...], PreparedMask]
    ) -> MemoryContext:
        _, softcap, dropout = key = _needs(block.cross_attention)
        if key not in masks:
            queries = given.documents_BS
            mask = Mask(declared.n_queries, memory.length, False, None, memory.documents_BS, memory.valid_BS, query_documents_BT=queries)
            masks[key] = _with_kernel(mask, None, softcap, dropout, x_BTD)
        return MemoryContext(masks[key], memory.output_BSD, cache)


def _with_kernel(mask: Mask, bias: Tensor | None, softcap: bool, dropout: bool, x_BTD: Tensor) -> PreparedMask:
    device, dtype = x_BTD.device, x_BTD.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    half = dtype in (torch.bfloat16, torch.float16)
    kernel = choose_kernel(mask, device_type=device.type, softcap=softcap, bias=bias is not None, dropout=dropout, half=half)
    return prepare(mask, kernel, bias, device, dtype)


def _needs(attention: Any) -> tuple[int | None, bool, bool]:
    """What a kernel depends on: window, softcap, dropout. A user's own attention is any module, and may lack them."""
    window, softcap = getattr(attention, "window", None), getattr(attention, "softcap", None)
    return window, softcap is not None, bool(attention.training and getattr(attention, "dropout", 0.0))

"""Blocks of one kind, and the masks, positions and caches that they share."""

# B batch, T query positions, S key positions, D model size

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from txtrain.model.attention.cache import Cache, CrossCache
from txtrain.model.attention.kernel_choice import choose_kernel
from txtrain.model.attention.mask import Mask, PreparedMask, prepare
from txtrain.model.block import CrossBlock
from txtrain.model.context import Context, CrossContext
from txtrain.model.position.encodings import Position


@dc.dataclass(frozen=True)
class Given:
    """The tokens that a stack reads: their positions, documents, padding and prefix; None where there are none.

    distances_BS: positions of all keys, past ones included, whose differences are distances, [B or 1, S].
    grid: rows and columns of an image's patches.
    """

    position_ids_BT: Tensor
    distances_BS: Tensor
    valid_BS: Tensor | None = None
    documents_BS: Tensor | None = None
    prefix_BS: Tensor | None = None
    grid: tuple[int, int] | None = None

    def first(self, n: int) -> Given:
        """The first n tokens alone, without a cache."""
        masks = self.valid_BS, self.documents_BS, self.prefix_BS
        valid, documents, prefix = (None if x is None else x[:, :n] for x in masks)
        return Given(self.position_ids_BT[:, :n], self.distances_BS[:, :n], valid, documents, prefix, self.grid)


@dc.dataclass
class Record:
    """Statistics of the blocks, by the block's name. loss_scale: factor of their auxiliary losses, see context.py."""

    statistics: dict[str, Tensor] = dc.field(default_factory=dict)
    loss_scale: Tensor | None = None  # on the device of the first block

    def scale_on(self, device: torch.device) -> Tensor:
        if self.loss_scale is None:
            self.loss_scale = torch.ones((), dtype=torch.float32, device=device)
        return self.loss_scale


@dc.dataclass(frozen=True)
class EncoderOutput:
    """The encoder's output, for cross-attention; output_BSD is None where the cache has its keys and values."""

    output_BSD: Tensor | None
    length: int
    valid_BS: Tensor | None = None
    documents_BS: Tensor | None = None


class Stack(nn.Module):
    """Position, blocks and final norm."""

    def __init__(
        self, position: Position, blocks: Sequence[nn.Module], final_norm: nn.Module | None, causal: bool,
        output_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.position = position
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = final_norm
        self.causal = causal
        self.compiled = False  # whether the blocks are
        self.output_dropout = nn.Dropout(output_dropout)

    def new_cache(self) -> Cache:
        windows = [_needs(block.attention)[0] for block in self.blocks]
        return Cache(windows, with_cross=isinstance(self.blocks[0], CrossBlock))

    def run(
        self, x_BTD: Tensor, given: Given, cache: Cache | None = None, encoded: EncoderOutput | None = None,
        record: Record | None = None, name: str = "",
    ) -> Tensor:
        """[B, T, D] through all blocks and the final norm. name: a prefix for the record."""
        blocks = {f"{name}blocks.{i}": block for i, block in enumerate(self.blocks)}
        x_BTD = self.through(blocks, x_BTD, given, cache, encoded, record)
        x_BTD = x_BTD if self.final_norm is None else self.final_norm(x_BTD)
        return self.output_dropout(x_BTD)

    def through(
        self, blocks: Mapping[str, nn.Module], x_BTD: Tensor, given: Given, cache: Cache | None = None,
        encoded: EncoderOutput | None = None, record: Record | None = None,
    ) -> Tensor:
        """[B, T, D] through blocks, by their names in the record, that share masks and positions."""
        T, S = x_BTD.shape[1], given.distances_BS.shape[1]
        declared = Mask(T, S, self.causal, None, given.documents_BS, given.valid_BS, given.prefix_BS)
        positions_BT, valid_BS = given.position_ids_BT, given.valid_BS
        if valid_BS is not None and self.position.by_length:
            positions_BT = torch.where(valid_BS[:, -T:], positions_BT, 0)
        rotation = self.position.rotation(positions_BT, x_BTD.dtype)
        masks: dict[tuple[Any, ...], PreparedMask] = {}
        for i, (name, block) in enumerate(blocks.items()):
            layer_cache = None if cache is None else cache.layers[i]
            n_keys = S if layer_cache is None else layer_cache.n_held + T
            window, softcap, dropout = _needs(block.attention)
            key = window, softcap, dropout, n_keys
            if key not in masks:
                distances_BS = given.distances_BS[:, -n_keys:]
                bias = self.position.bias(distances_BS[:, -T:], distances_BS)
                mask = declared.windowed(window, n_keys)
                masks[key] = _with_kernel(mask, bias, softcap, dropout, x_BTD, varying=not self.compiled)
            cross = None
            if encoded is not None:
                cross = _cross(block, encoded, None if cache is None else cache.cross[i], x_BTD, given, masks)
            statistics: dict[str, Tensor] = {}
            loss_scale = None if record is None else record.scale_on(x_BTD.device)
            x_BTD = block(x_BTD, context=Context(masks[key], rotation, layer_cache, cross, statistics, loss_scale))
            if record is not None:
                record.statistics.update({f"{name}.{kind}": value for kind, value in statistics.items()})
        return x_BTD


def _cross(
    block: Any, encoded: EncoderOutput, cache: CrossCache | None, x_BTD: Tensor, given: Given, masks: dict[Any, Any]
) -> CrossContext:
    _, softcap, dropout = _needs(block.cross_attention)
    key = "cross", softcap, dropout
    if key not in masks:
        documents, of_queries = encoded.documents_BS, given.documents_BS
        mask = Mask(x_BTD.shape[1], encoded.length, False, None, documents, encoded.valid_BS, None, of_queries)
        masks[key] = _with_kernel(mask, None, softcap, dropout, x_BTD)
    return CrossContext(masks[key], encoded.output_BSD, cache)


def _with_kernel(
    mask: Mask, bias: Tensor | None, softcap: bool, dropout: bool, x_BTD: Tensor, varying: bool = True
) -> PreparedMask:
    device, dtype = x_BTD.device, x_BTD.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    given = {
        "softcap": softcap, "dropout": dropout, "half": dtype in (torch.bfloat16, torch.float16),
        "bias": bias is not None, "learned": bias is not None and bias.requires_grad,
    }
    kernel = choose_kernel(mask, device_type=device.type, **given)
    return prepare(mask, kernel, bias, device, dtype, varying)


def _needs(attention: Any) -> tuple[int | None, bool, bool]:
    """Window, softcap and dropout, which decide the kernel. A user's own attention may be any module, without them."""
    window, softcap = getattr(attention, "window", None), getattr(attention, "softcap", None)
    return window, softcap is not None, bool(attention.training and getattr(attention, "dropout", 0.0))

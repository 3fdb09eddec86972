"""Tensors from our layout to theirs and back, by the tables of name_map.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from txtrain.hf import renumbering
from txtrain.hf.name_map import Shape, Stored
from txtrain.hf.pieces import Box, Piece
from txtrain.hf.weights import Weights
from txtrain.model.lora import merged
from txtrain.model.transformer import Transformer


def tensors_of(model: Transformer) -> dict[str, Tensor]:
    """Parameters and persistent buffers that a class of transformers has: all but multi-token prediction's. An adapter
    is merged."""
    return {name: tensor for name, tensor in merged(model).items() if not name.startswith("mtp.")}


class Renumbered(Mapping[str, Tensor]):
    """Tensors of ours with the dimensions of the residual stream in the order of `renumbering`, one at a time."""

    def __init__(self, tensors: Mapping[str, Tensor], dim: int) -> None:
        self._tensors, self._order = tensors, torch.tensor(renumbering.order(dim), device="cpu")

    def __getitem__(self, name: str) -> Tensor:
        at, tensor = renumbering.along(name), self._tensors[name]
        return tensor if at is None else tensor.index_select(at, self._order.to(tensor.device))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def to_theirs(stored: Stored, ours: Mapping[str, Tensor]) -> Tensor:
    """One tensor of theirs."""
    parts = [ours[name].detach() for name in stored.parts]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, _joined_along(parts[0].ndim))
    if stored.expert is not None:
        whole = whole[stored.expert]
    if stored.order is not None:
        whole = whole[stored.order]
    if stored.leading:
        whole = whole[None]
    return whole.T if stored.transposed else whole


def to_ours(stored: Stored, theirs: Tensor, ours: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The other way, for a whole tensor that is no single expert's. ours: shapes."""
    whole = theirs.T if stored.transposed else theirs
    whole = whole[0] if stored.leading else whole
    if stored.order is not None:
        whole = whole[torch.tensor(stored.order).argsort()]
    along = _joined_along(whole.ndim)
    parts = torch.split(whole, [ours[name][along] for name in stored.parts], along)
    return {name: part.contiguous() for name, part in zip(stored.parts, parts, strict=True)}


def _joined_along(ndim: int) -> int:
    """The dimension of outputs; of stacked experts the second."""
    return 1 if ndim == 3 else 0


def from_theirs(stored: Stored, weights: Weights, ours: Mapping[str, Shape]) -> Iterator[Piece]:
    """One tensor of theirs as pieces of ours."""
    first = 0  # row of our concatenated tensors
    for name in stored.parts:
        shape = ours[name]
        if stored.expert is None:
            yield Piece(name, (0,) * len(shape), shape, partial(_read, stored, weights, first))
        else:
            begin = stored.expert, *(0 for _ in shape[1:])
            yield Piece(name, begin, (1, *shape[1:]), partial(_read_expert, stored, weights))
        first += shape[0]


def _read_expert(stored: Stored, weights: Weights, box: Box) -> Tensor:
    return _read(stored, weights, 0, box[1:])[None]


def _read(stored: Stored, weights: Weights, first: int, box: Box) -> Tensor:
    """first: row of the box's parameter among those that are concatenated."""
    (low, high), *rest = box
    rows, wanted = slice(first + low, first + high), slice(None)
    order = None  # for each row of ours, its row in theirs
    if stored.order is not None:
        order = torch.tensor(stored.order, device="cpu").argsort()[rows]
    if stored.leading:
        found = weights.read(stored.name)[0]
    elif stored.transposed:
        found = weights.read(stored.name, rest[0]).T
        rest = []
    else:  # rearranged rows: all from the first to the last
        rows = rows if order is None else slice(int(order.min()), int(order.max()) + 1)
        found = weights.read(stored.name, (rows.start, rows.stop))
        rows, order = wanted, None if order is None else order - rows.start
    found = found[rows] if order is None else found.index_select(0, order)
    return found[(wanted, *(slice(*cut) for cut in rest))]

"""Tensors from our layout to theirs and back, by the tables of name_map.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from txtrain.hf.name_map import Shape, Stored
from txtrain.hf.pieces import Box, Piece
from txtrain.hf.weights import Weights
from txtrain.model.lora import merged
from txtrain.model.transformer import Transformer


def tensors_of(model: Transformer) -> dict[str, Tensor]:
    """Parameters and persistent buffers that a class of transformers has: all but multi-token prediction's. An adapter
    is merged."""
    return {name: tensor for name, tensor in merged(model).items() if not name.startswith("mtp.")}


def to_theirs(stored: Stored, ours: Mapping[str, Tensor]) -> Tensor:
    """One tensor of theirs."""
    parts = [ours[name].detach() for name in stored.parts]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if stored.expert is not None:
        whole = whole[stored.expert]
    if stored.order is not None:
        whole = whole[stored.order]
    if stored.leading:
        whole = whole[None]
    return whole.T if stored.transposed else whole


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

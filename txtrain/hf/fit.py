"""Weights for a model that differs from theirs: new tokens, other lengths and images, a new head.

    embedding, head      rows of new tokens start at the mean of the old ones
    learned positions    interpolated to a longer table; of a shorter one the first rows
    positions of images  interpolated over the patches
    head                 another one is initialised

At most one tensor is whole in memory at a time.
"""

from __future__ import annotations

import dataclasses as dc
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from txtrain.errors import ConfigError
from txtrain.ground.patterns import unfound
from txtrain.hf.name_map import Shape, n_elements
from txtrain.hf.pieces import Box, Piece, Source, other_tensor, part_of, shapes_of
from txtrain.model.config import ModelConfig
from txtrain.model.position.encodings import Learned
from txtrain.registry import cut_of

_AT_ONCE = 1 << 22  # elements
_SHOWN = 5  # tensors in a message


@dc.dataclass(frozen=True)
class Fit:
    """What became of the weights, by name.

    Attributes:
        loaded: tensors of the model that are read.
        skipped: tensors of the files that are not.
        initialised: tensors of the model that are not read.
        resized: of those in `loaded`, the shapes there and here.
    """

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    initialised: tuple[str, ...]
    resized: Mapping[str, tuple[Shape, Shape]]


def fitted(
    source: Source, model: nn.Module, config: ModelConfig, allowed: Sequence[str] = ()
) -> tuple[Source, Fit]:
    """The source with the tensors that the model takes, and what became of each. Reads none.

    Args:
        model: perhaps on the meta device. config: its own.
        allowed: patterns of tensors that may be absent there, or of another shape, or absent here.

    Raises:
        ConfigError: another tensor does not fit; or a pattern is in no tensor's name.
    """
    saved = {name: shape for name, shape in shapes_of(source.model).items() if name in source.names}
    wanted = shapes_of(model)
    every = {**wanted, **saved}
    if problems := list(unfound(list(every), {f"init_allow_missing[{i}]": p for i, p in enumerate(allowed)})):
        raise ConfigError(*problems)
    other_head = source.model.config.head != config.head
    named = {name for name in every if any(re.search(p, name) for p in allowed)}
    free = named | {name for name in every if other_head and name.startswith("head.")}
    resized = {
        name: piece for name, shape in wanted.items()
        if saved.get(name, shape) != shape and name not in named
        and (piece := _resized(name, saved[name], shape, source, model, config)) is not None
    }
    same = [name for name, shape in wanted.items() if saved.get(name) == shape]
    taken = {*same, *resized}
    if other := [name for name in every if name not in taken and name not in free]:
        more = [f"and {len(other) - _SHOWN:,} more"] if len(other) > _SHOWN else []
        told = [other_tensor(name, saved, wanted, f"`init_from`: {source.path}") for name in other[:_SHOWN]]
        raise ConfigError(*told, *more, _remedy(other))
    fit = Fit(
        loaded=tuple(name for name in wanted if name in taken),
        skipped=tuple(name for name in saved if name not in taken),
        initialised=tuple(name for name in wanted if name not in taken),
        resized={name: (saved[name], wanted[name]) for name in resized},
    )
    whole = set(same)
    return dc.replace(source, pieces=[*(p for p in source.pieces if p.name in whole), *resized.values()]), fit


def _remedy(names: Sequence[str]) -> str:
    parts = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    shared = os.path.commonpath([part.replace(".", "/") for part in parts]).replace("/", ".")
    if len(parts) > 2 and "." in shared:
        parts = [f"{shared}."]  # a whole layer
    how = f"init_allow_missing=[{','.join(parts[:2])}]"
    return f"To initialise what is absent there and skip what is absent here: {how}."


def _resized(
    name: str, was: Shape, now: Shape, source: Source, model: nn.Module, config: ModelConfig
) -> Piece | None:
    """One of our tensors from theirs of another shape; None if that cannot be."""
    pieces = [piece for piece in source.pieces if piece.name == name]
    if _is_by_tokens(name, config) and was[0] < now[0] and was[1:] == now[1:]:
        return Piece(name, (0,) * len(now), now, _Grown(pieces, was))
    owner = name.removesuffix(".embedding.weight")
    if owner == name or was[1:] != now[1:]:
        return None
    there, here = source.model.get_submodule(owner), model.get_submodule(owner)
    if not (isinstance(there, Learned) and isinstance(here, Learned) and here.takes(there)):
        return None
    grid = there.grid

    @cache
    def table() -> Tensor:
        return here.from_table(part_of(pieces, [(0, n) for n in was]), grid)

    return Piece(name, (0, 0), now, lambda box: table()[tuple(slice(*cut) for cut in box)])


def _is_by_tokens(name: str, model: ModelConfig) -> bool:
    """Whether the tensor has a row for each token."""
    for axis, config, owners in (
        ("embedding", model.embedding, ("embedding.", "encoder_embedding.")), ("head", model.head, ("head.",))
    ):
        cut = cut_of(axis, config)
        for owner in owners:
            local = name.removeprefix(owner)
            if local != name and "vocabulary" in (cut.get(local), cut.get(local.rpartition(".")[0])):
                return True
    return False


class _Grown:
    """Reads a tensor with further rows, each the mean of those that are there."""

    def __init__(self, pieces: Sequence[Piece], was: Shape) -> None:
        self._pieces, self._was = pieces, was
        self._mean: Tensor | None = None

    def __call__(self, box: Box) -> Tensor:
        (first, last), *rest = box
        n_old = self._was[0]
        parts = [part_of(self._pieces, [(first, min(last, n_old)), *rest])] if first < n_old else []
        if last > n_old:
            row = self._row()[tuple(slice(*cut) for cut in rest)]
            parts.append(row.expand(last - max(first, n_old), *row.shape))
        return torch.cat(parts)

    def _row(self) -> Tensor:
        """Summed in one order and in double precision: equal on all ranks, whatever they hold."""
        if self._mean is None:
            total = torch.zeros(self._was[1:], dtype=torch.float64, device="cpu")
            for rows in self._chunks():
                total += part_of(self._pieces, [rows, *((0, n) for n in self._was[1:])]).double().sum(0)
            self._mean = (total / self._was[0]).float()
        return self._mean

    def _chunks(self) -> Iterator[tuple[int, int]]:
        step = max(1, _AT_ONCE // n_elements(self._was[1:]))
        return ((i, min(i + step, self._was[0])) for i in range(0, self._was[0], step))

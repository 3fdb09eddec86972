"""Names and layouts of tensors, as tables that read both ways. `{}` is the layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from txtrain.model.config import ModelConfig

Shape = tuple[int, ...]
EXPERT = "{expert}"  # in a name of theirs: our tensor stacks the experts'


class Row(NamedTuple):
    """A module of theirs (or a tensor), and the modules of ours that it holds, concatenated along the output."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False  # weights are [in, out], as in GPT's Conv1D
    order: Callable[[ModelConfig], list[int]] | None = None  # for each of their outputs, its index in ours
    when: Callable[[ModelConfig], bool] = lambda model: True  # the row applies to this model
    leading: bool = False  # theirs has a leading dimension of size 1
    spare: bool = False  # a second name of an earlier row's tensor: always written, read only if the first is missing


def linear(theirs: str, ours: str) -> Row:
    return Row(theirs, (ours,))


def linears(theirs: str, ours: str, names: Mapping[str, str]) -> tuple[Row, ...]:
    """A `linear` for each pair of names, after these prefixes."""
    return tuple(linear(theirs + name, ours + own) for name, own in names.items())


def conv1d(theirs: str, *ours: str) -> Row:
    return Row(theirs, ours, transposed=True)


class Stored(NamedTuple):
    """One tensor of theirs."""

    name: str
    parts: tuple[str, ...]  # our parameters, concatenated along their first dimension
    shape: Shape
    transposed: bool  # this and order, leading, spare: see Row
    order: list[int] | None = None
    expert: int | None = None  # its index in our stacked tensor
    leading: bool = False
    spare: bool = False


def stored_tensors(rows: Iterable[Row], model: ModelConfig, parameters: Mapping[str, Shape]) -> list[Stored]:
    """The tensors of a folder for a model with these parameters, in the order of the layers."""
    found = [s for row in by_layer(rows, model) for s in stored_of(row, model, parameters)]
    covered = {part for stored in found for part in stored.parts}
    assert covered == parameters.keys(), f"no name for {sorted(parameters.keys() ^ covered)}"
    return found


def by_layer(rows: Iterable[Row], model: ModelConfig) -> list[Row]:
    """The rows that apply to the model, once for each layer, in the order of the layers."""
    chosen = [row for row in rows if row.when(model)]
    body = [row for row in chosen if "{}" in row.theirs]
    first = chosen.index(body[0])
    stacks = {"encoder.": model.encoder_layers, "blocks.": model.n_layers}
    layers = [
        row._replace(theirs=row.theirs.replace("{}", str(i)), ours=tuple(o.replace("{}", str(i)) for o in row.ours))
        for stack, n in stacks.items() for i in range(n) for row in body if row.ours[0].startswith(stack)
    ]
    return [*chosen[:first], *layers, *(row for row in chosen[first:] if "{}" not in row.theirs)]


def stored_of(row: Row, model: ModelConfig, parameters: Mapping[str, Shape]) -> Iterator[Stored]:
    """The tensors of one row, of one layer; none of ours is in `parameters`: none."""
    if row.ours[0] in parameters:
        yield from _of_tensor(row, row.ours[0], parameters[row.ours[0]])
        return
    for kind in ("weight", "bias"):
        parts = tuple(f"{module}.{kind}" for module in row.ours)
        if all(part in parameters for part in parts):
            shapes = [parameters[part] for part in parts]
            joined = (sum(shape[0] for shape in shapes), *shapes[0][1:])
            transposed = row.transposed and kind == "weight"
            order = None if row.order is None else row.order(model)
            yield Stored(f"{row.theirs}.{kind}", parts, joined[::-1] if transposed else joined, transposed, order)


def _of_tensor(row: Row, ours: str, shape: Shape) -> Iterator[Stored]:
    if len(row.ours) > 1:  # stacks of experts, joined along the output, all of one shape
        yield Stored(row.theirs, row.ours, (shape[0], len(row.ours) * shape[1], *shape[2:]), False)
        return
    if EXPERT not in row.theirs:
        shape = (1, *shape) if row.leading else shape
        yield Stored(row.theirs, (ours,), shape, False, leading=row.leading, spare=row.spare)
        return
    for i in range(shape[0]):
        yield Stored(row.theirs.replace(EXPERT, str(i)), (ours,), shape[1:], False, expert=i)


def respelt(name: str, renamed: Iterable[tuple[str, str]]) -> str:
    """A name with what matches each pattern replaced."""
    for pattern, replacement in renamed:
        name = re.sub(pattern, replacement, name)
    return name


def n_elements(shape: Shape) -> int:
    return math.prod(shape)

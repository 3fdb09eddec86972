"""Names and layouts of tensors, as tables that read both ways. `{}` stands for the layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from txtrain.model.config import ModelConfig

Shape = tuple[int, ...]
EXPERT = "{expert}"  # in a name of theirs: ours holds one for each, side by side in a dimension of its own


class Row(NamedTuple):
    """A module of theirs and the modules of ours that it holds, side by side along the output.

    A name of ours may be a tensor's own; then so is theirs.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False  # weights are [in, out], as in GPT's Conv1D
    order: Callable[[ModelConfig], list[int]] | None = None  # of their outputs: which of ours, joined, each of them is
    when: Callable[[ModelConfig], bool] = lambda model: True  # the class calls it so
    leading: bool = False  # theirs has a dimension of size one before ours
    spare: bool = False  # another name of what a row before has: always written, read only where that one is missing


def linear(theirs: str, ours: str) -> Row:
    return Row(theirs, (ours,))


def conv1d(theirs: str, *ours: str) -> Row:
    return Row(theirs, ours, transposed=True)


class Stored(NamedTuple):
    """One tensor of theirs."""

    name: str
    parts: tuple[str, ...]  # our parameters, joined along their first dimension
    shape: Shape
    transposed: bool
    order: list[int] | None = None  # of their outputs, see Row
    expert: int | None = None  # of a tensor of ours that holds several of theirs
    leading: bool = False  # see Row
    spare: bool = False


def stored_tensors(rows: Iterable[Row], model: ModelConfig, parameters: Mapping[str, Shape]) -> list[Stored]:
    """What a folder holds for a model with these parameters, in the order of the layers."""
    head: list[Row] = []
    body: list[Row] = []
    tail: list[Row] = []
    for row in (r for r in rows if r.when(model)):
        where = body if "{}" in row.theirs else tail if body else head
        where.append(row)
    stacks = {"encoder.": model.encoder_layers, "blocks.": model.n_layers}
    layers = [_of_layer(row, i) for stack, n in stacks.items() for i in range(n) for row in body if row.ours[0].startswith(stack)]
    found = [s for row in (*head, *layers, *tail) for s in _of_row(row, model, parameters)]
    covered = {part for stored in found for part in stored.parts}
    assert covered == parameters.keys(), f"no name for {sorted(parameters.keys() ^ covered)}"
    return found


def _of_layer(row: Row, layer: int) -> Row:
    return row._replace(theirs=row.theirs.replace("{}", str(layer)), ours=tuple(name.replace("{}", str(layer)) for name in row.ours))


def _of_row(row: Row, model: ModelConfig, parameters: Mapping[str, Shape]) -> Iterator[Stored]:
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
    if EXPERT not in row.theirs:
        yield Stored(row.theirs, (ours,), (1, *shape) if row.leading else shape, False, leading=row.leading, spare=row.spare)
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

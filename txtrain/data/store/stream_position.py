"""Where each reader of a stream is: what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from txtrain.errors import ConfigError


class Position(NamedTuple):
    """Where a document of a reader begins. Everything counts from 0.

    Attributes:
        token: in the reader's tokens, over all epochs.
        block: of the reader, over all epochs; turn: rows before the document in the shuffled block.
        epoch, file, part, row: where the block begins: file of the epoch, its part, row of the part.
        number: the number of that row.
    """

    token: int = 0
    block: int = 0
    turn: int = 0
    epoch: int = 0
    file: int = 0
    part: int = 0
    row: int = 0
    number: int = 0


Positions = tuple[Position, ...]  # of each reader
WIDTH = len(Position())  # numbers of one


def is_position(saved: Sequence[int]) -> bool:
    """Whether a checkpoint may hold it: numbers of whole readers, or token, epoch and row in one of version 0.1.0."""
    return len(saved) == 3 or (len(saved) > 0 and len(saved) % WIDTH == 0)


def positions(saved: Sequence[int], n_readers: int) -> Positions:
    """Those of a checkpoint (`is_position`), all numbers one behind the other.

    Raises:
        ConfigError: they are of other readers.
    """
    if len(saved) == 3:
        token, epoch, row = saved
        found: Positions = (Position(token, epoch=epoch, row=row, number=row),)
    else:
        found = tuple(Position(*saved[i : i + WIDTH]) for i in range(0, len(saved), WIDTH))
    if len(found) != n_readers:
        there = f"{len(found)}, as in the checkpoint"
        raise ConfigError(f"`data.stream_readers` must be {there}, but is {n_readers} instead.")
    return found


def furthest(of_ranks: Sequence[Sequence[Sequence[int]]]) -> list[int]:
    """What a checkpoint keeps of the positions that each rank has: of each reader the furthest, all numbers one behind
    the other. A rank reads for some readers alone."""
    return [number for of_reader in zip(*of_ranks, strict=True) for number in max(of_reader)]

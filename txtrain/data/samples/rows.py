"""Datasets as the loaders read them: a whole batch at once, by global sample indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from txtrain.data.samples.draws import Draws
from txtrain.data.samples.order import GlobalOrder, Indices
from txtrain.data.sources.source import Samples
from txtrain.data.store.stream import StreamTokens
from txtrain.errors import ConfigError

PROBED = 64  # rows of each split that are read before a run starts
_TOGETHER = 16
FILLER = -1  # index of no sample, for ranks with an empty share


class Rows(Protocol):
    """Samples that are read by row, many at a time. All randomness comes from `draws`."""

    def __len__(self) -> int: ...

    def batch(self, rows: Indices, draws: Draws) -> dict[str, Tensor]: ...

    def sources(self, rows: Indices) -> list[list[int]]:
        """For each row the numbers of its source items: documents, conversations, pairs. By default its own number."""
        return [[row] for row in rows.tolist()]


def padded(rows: Sequence[Any], fill: int, width: int | None = None, dtype: Any = np.int64) -> Tensor:
    """[B, width] of rows of different lengths, right-padded; None: the longest's width."""
    made = np.full((len(rows), width or max(map(len, rows))), fill, dtype=dtype)
    for i, row in enumerate(rows):
        made[i, : len(row)] = row
    return torch.from_numpy(made)


def mask_of(rows: Sequence[Any], width: int | None = None) -> Tensor:
    """[B, width], int64: 1 where `padded` has a row's own values."""
    return padded([np.ones(len(row)) for row in rows], 0, width)


class Mapped(Rows):
    """Rows with a change of each batch: masks, crops."""

    def __init__(self, rows: Rows, change: Callable[[dict[str, Tensor], Draws], dict[str, Tensor]]) -> None:
        self.rows, self.change = rows, change

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Indices, draws: Draws) -> dict[str, Tensor]:
        return self.change(self.rows.batch(rows, draws), draws)

    def sources(self, rows: Indices) -> list[list[int]]:
        return self.rows.sources(rows)


class OrderedSamples(Dataset[dict[str, Tensor]]):
    """What a loader indexes: by global sample indices, mapped to rows by the order, or by rows (validation).

    Batches also hold `sample_index`, int64 [B], and those of a stream `stream_position`, int64 [B, readers, 8]: a
    `Position` of each reader from which the next batch can be read.
    """

    def __init__(
        self, rows: Rows, seed: int, order: GlobalOrder | None = None, stream: StreamTokens | None = None
    ) -> None:
        self.rows, self.seed, self.order, self.stream = rows, seed, order, stream

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        index = np.asarray(indices, dtype=np.int64)
        # Validation is the same for every seed.
        draws = Draws(self.seed, "train", index) if self.order else Draws(0, "validation", index)
        batch = self.rows.batch(self.order.rows(index) if self.order else index.clip(min=0), draws)
        if self.stream is not None:
            position = torch.from_numpy(self.stream.position)
            batch = {**batch, "stream_position": position.expand(len(index), -1, -1)}
        return {**batch, "sample_index": torch.from_numpy(index)}


class ListedSamples(Rows):
    """Some rows of a source's own samples, stacked. `labels` default to the input_ids.

    Args:
        said: name of the samples in errors.
        below: bound of the `input_ids`; None: they are no token ids.
    """

    def __init__(self, samples: Samples, rows: Indices, said: str, below: int | None) -> None:
        self.samples, self.rows, self.said, self.below = samples, rows, said, below

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Indices, draws: Draws | None = None) -> dict[str, Tensor]:
        """The stacked samples. Raises ConfigError: keys or shapes differ between samples, or an id is out of bounds."""
        picked = [self._read(row) for (row,) in self.sources(rows)]
        batch = {key: torch.stack([sample[key] for sample in picked]) for key in picked[0]}
        if "input_ids" in batch:
            self._check_ids(batch["input_ids"], self.rows[rows])
            batch.setdefault("labels", batch["input_ids"].clone())
        return batch

    def sources(self, rows: Indices) -> list[list[int]]:
        return [[row] for row in self.rows[rows].tolist()]

    def _read(self, row: int) -> dict[str, Tensor]:
        sample = {key: torch.as_tensor(value) for key, value in self.samples[row].items()}
        first, shapes = self._shapes, _shapes(sample)
        if shapes.keys() != first.keys():
            raise ConfigError(
                f"`{self.said}` must have the keys of sample {self.rows[0]} ({', '.join(first)}) in all samples, "
                f"but sample {row} has {', '.join(shapes)}."
            )
        if different := [key for key in first if shapes[key] != first[key]]:
            key = different[0]
            raise ConfigError(
                f"`{self.said}`: {key!r} must have one shape in all samples, but has {first[key]} in sample "
                f"{self.rows[0]} and {shapes[key]} in sample {row}."
            )
        return sample

    @cached_property
    def _shapes(self) -> dict[str, list[int]]:
        return _shapes(self.samples[int(self.rows[0])])

    def _check_ids(self, ids: Tensor, rows: Indices) -> None:
        if self.below is None or ids.is_floating_point() or not ids.numel():
            return
        wrong = (ids < 0) | (ids >= self.below)
        if wrong.any():
            at = wrong.nonzero()[0].tolist()
            raise ConfigError(
                f"`{self.said}`: 'input_ids' must be from 0 to {self.below - 1}, but sample {rows[at[0]]} has "
                f"{ids[tuple(at)]} at {at[1:]}: a larger model.vocab_size?"
            )


def _shapes(sample: Mapping[str, Any]) -> dict[str, list[int]]:
    return {key: list(torch.as_tensor(sample[key]).shape) for key in sorted(sample)}


def probe(rows: Rows) -> None:
    """Read at most PROBED rows, spread evenly over all, before a run starts.

    Raises:
        ConfigError: as reading them does.
    """
    n = min(len(rows), PROBED)
    index = np.arange(n) * len(rows) // max(n, 1)
    for at in range(0, n, _TOGETHER):
        rows.batch(index[at : at + _TOGETHER], Draws(0, "validation", index[at : at + _TOGETHER]))

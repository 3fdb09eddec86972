"""Datasets as the loaders read them: a whole batch at once, addressed by global sample index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

FILLER = -1  # an index that stands for no sample: what a process reads whose share is empty


class Rows(Protocol):
    """Samples that are read by row, many at a time. What is random in them comes from `draws`, and from nowhere else."""

    def __len__(self) -> int: ...

    def batch(self, rows: Indices, draws: Draws) -> dict[str, Tensor]: ...


class Mapped:
    """Rows, and what is done to each batch of them: masks, crops."""

    def __init__(self, rows: Rows, change: Callable[[dict[str, Tensor], Draws], dict[str, Tensor]]) -> None:
        self.rows, self.change = rows, change

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Indices, draws: Draws) -> dict[str, Tensor]:
        return self.change(self.rows.batch(rows, draws), draws)


class OrderedSamples(Dataset[dict[str, Tensor]]):
    """What a loader indexes: global sample indices to rows by the order, or rows themselves without one (validation).

    The index travels in the batch as `sample_index`, int64 [B]; of a stream also `stream_position`, int64 [B, 3]: a `Position` from
    which the next batch can be read.
    """

    def __init__(self, rows: Rows, seed: int, order: GlobalOrder | None = None, stream: StreamTokens | None = None) -> None:
        self.rows, self.seed, self.order, self.stream = rows, seed, order, stream

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        index = np.asarray(indices, dtype=np.int64)
        draws = Draws(self.seed, "train", index) if self.order else Draws(0, "validation", index)  # for runs of any seed the same
        batch = self.rows.batch(self.order.rows(index) if self.order else index.clip(min=0), draws)
        if self.stream is not None:
            batch = {**batch, "stream_position": torch.tensor([self.stream.position] * len(index))}
        return {**batch, "sample_index": torch.from_numpy(index)}


class ListedSamples:
    """Some rows of a source's own samples, stacked. `labels` are the input_ids where the source gives none."""

    def __init__(self, samples: Samples, rows: Indices) -> None:
        self.samples, self.rows = samples, rows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Indices, draws: Draws | None = None) -> dict[str, Tensor]:
        picked = [self.samples[int(self.rows[row])] for row in rows]
        batch = {key: _stack(key, [sample[key] for sample in picked]) for key in picked[0]}
        if "input_ids" in batch:
            batch.setdefault("labels", batch["input_ids"].clone())
        return batch


def _stack(key: str, values: list[Any]) -> Tensor:
    tensors = [torch.as_tensor(value) for value in values]
    if len({t.shape for t in tensors}) > 1:
        shapes = sorted({tuple(t.shape) for t in tensors})
        raise ConfigError(f"`samples()`: {key!r} must have one shape in all samples, but has {' and '.join(map(str, shapes[:3]))}.")
    return torch.stack(tensors)

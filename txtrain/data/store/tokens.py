"""Tokens in memory-mapped files of any number and format, as one stream.

      file 0            file 1      file 2          nothing is read in advance, and nothing is kept:
    [a a a b b b b c c][d d d d e][f f f f f f]     the files may be larger than memory
     0                  9         14                `begin` and `end` count from the start of the stream

A sample may begin in one file and end in the next. Every file begins a document.
"""

# B batch, T tokens of a window

from __future__ import annotations

import dataclasses as dc
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txtrain.data.samples.order import Indices
from txtrain.data.sources.files import HASHED_BELOW
from txtrain.data.sources.source import Split
from txtrain.errors import ConfigError

Borders = Callable[[], Indices]  # picklable: a module's function, or a partial of one
_PROBED = 1 << 12
_SCANNED = 1 << 22  # tokens at a time when documents are found by their end tokens


@dc.dataclass(frozen=True)
class Shard:
    """Some tokens of one file. Arrays are opened where they are read: a copy sent to a worker process has paths only.

    Attributes:
        n_tokens: of type dtype, from byte first_byte of the file on.
        borders: returns int64 [n_documents + 1]: the begin of each document, and the end; None: unknown to the format.
        trained: a file with a byte per token of `path`, 1 if it is trained; None: all are.
        numbers: returns int64 [n_documents]: the source item of each document; None: 0, 1, 2, ...
    """

    path: Path
    dtype: str
    n_tokens: int
    first_byte: int = 0
    borders: Borders | None = None
    trained: Path | None = None
    numbers: Borders | None = None

    @cached_property
    def ids(self) -> NDArray[Any]:
        if not self.n_tokens:  # an empty file cannot be mapped
            return np.zeros(0, dtype=self.dtype)
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.first_byte, shape=(self.n_tokens,))

    @cached_property
    def offsets(self) -> Indices | None:
        if self.borders is None:
            return None
        found = self.borders()
        if found.ndim != 1 or found.dtype.kind not in "iu" or not len(found) or found[-1] != self.n_tokens:
            raise ConfigError(f"{self.path}: its document offsets must end at {self.n_tokens:,} tokens, but do not.")
        return found

    def part(self, begin: int, end: int) -> Shard:
        """Tokens begin to end - 1, with the documents, or parts of documents, among them."""
        borders = None if self.borders is None else partial(_within, self.borders, begin, end)
        first_byte = self.first_byte + begin * np.dtype(self.dtype).itemsize
        return Shard(self.path, self.dtype, end - begin, first_byte, borders, self.trained)

    def mask(self) -> Shard:
        """The bytes of `trained` for these tokens."""
        assert self.trained is not None
        return Shard(self.trained, "uint8", self.n_tokens, self.first_byte // np.dtype(self.dtype).itemsize)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dc.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _within(borders: Borders, begin: int, end: int) -> Indices:
    offsets = borders()
    first, last = np.searchsorted(offsets, begin, side="right"), np.searchsorted(offsets, end, side="left")
    return np.concatenate(([0], offsets[first:last] - begin, [end - begin]))


class Tokens:
    """One split of a text, as one stream.

    Args:
        eos_id: ends each document in files whose format has no document offsets; None: they are unknown.
        below: bound of the ids, checked in each window, since files may be too large to scan; None: no check.
        pairs: documents 2 k and 2 k + 1 are two answers to one prompt, the first of which is preferred.
    """

    def __init__(
        self, shards: Sequence[Shard], split: Split, eos_id: int | None = None, below: int | None = None,
        pairs: bool = False,
    ) -> None:
        self.pairs = pairs
        filled = tuple(s for s in shards if s.n_tokens)
        self.shards, self.split, self.eos_id, self.below = filled or tuple(shards[:1]), split, eos_id, below
        self._first = np.concatenate(([0], np.cumsum([s.n_tokens for s in self.shards], dtype=np.int64)))
        masked = any(s.trained is not None for s in self.shards)
        # 1 for each token that is trained; None: all are.
        self.mask: Tokens | None = Tokens([s.mask() for s in self.shards], split) if masked else None

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def kind(self) -> str:
        """As `DataConfig.kind`."""
        return "preferences" if self.pairs else "text" if self.mask is None else "chat"

    # ---------------------------------------------------------------------------------------------------------- windows

    def begins(self, rows: Indices, stride: int) -> Indices:
        """Where samples begin, int64 [B]. rows: their numbers."""
        return rows * stride

    def windows(self, begin_B: Indices, T: int) -> Indices:
        """int64 [B, T]: T tokens from each begin on.

        Raises:
            ConfigError: an id that the model does not have.
        """
        found_BT = np.empty((len(begin_B), T), dtype=np.int64)
        for k, rows, at_B in self._touched(begin_B, T):
            ids = self.shards[k].ids
            inside = (at_B >= 0) & (at_B + T <= len(ids))
            if inside.any():
                found_BT[rows[inside]] = np.lib.stride_tricks.sliding_window_view(ids, T)[at_B[inside]]
            for row, at in zip(rows[~inside], at_B[~inside], strict=True):
                here = ids[max(at, 0) : at + T]
                found_BT[row, max(-at, 0) : max(-at, 0) + len(here)] = here
        self._check(found_BT, begin_B)
        return found_BT

    def read(self, begin: int, end: int) -> Indices:
        """int64 [end - begin]."""
        row: Indices = self.windows(np.array([begin]), end - begin)[0]
        return row

    def trained(self, begin_B: Indices, T: int) -> NDArray[np.bool_] | None:
        """[B, T]: the tokens of each window that are trained; None: all."""
        return None if self.mask is None else self.mask.windows(begin_B, T) != 0

    def probe(self) -> None:
        """Check ids before a run starts: all if the files are small enough to be hashed, else some of each file.

        Raises:
            ConfigError: an id is outside of the model's vocabulary.
        """
        if sum(shard.n_tokens * np.dtype(shard.dtype).itemsize for shard in self.shards) < HASHED_BELOW:
            for k, shard in enumerate(self.shards):
                for begin in range(0, shard.n_tokens, _SCANNED):
                    self._check(shard.ids[None, begin : begin + _SCANNED], self._first[k : k + 1] + begin)
            return
        for k in range(0, len(self.shards), max(1, len(self.shards) // 256)):
            n, first = min(_PROBED, self.shards[k].n_tokens), int(self._first[k])
            for begin in {first, first + (self.shards[k].n_tokens - n) // 2, int(self._first[k + 1]) - n}:
                self.windows(np.array([begin]), n)

    def _check(self, found_BT: NDArray[Any], begin_B: Indices) -> None:
        if self.below is None or not found_BT.size or (int(found_BT.max()) < self.below and int(found_BT.min()) >= 0):
            return
        row, column = np.argwhere((found_BT >= self.below) | (found_BT < 0))[0]
        at = int(begin_B[row] + column)
        k = int(np.searchsorted(self._first, at, side="right")) - 1
        shard = self.shards[k]
        raise ConfigError(
            f"`data.path` must hold ids from 0 to {self.below - 1}, "
            f"but token {at - int(self._first[k]) + self._before(shard)} of {shard.path}, read as "
            f"{shard.dtype}, is {found_BT[row, column]}: a larger model.vocab_size, or another data.dtype."
        )

    @staticmethod
    def _before(shard: Shard) -> int:
        return shard.first_byte // np.dtype(shard.dtype).itemsize

    def _touched(self, begin_B: Indices, T: int) -> Iterator[tuple[int, Indices, Indices]]:
        """For each file with tokens of a window: its number, the windows, and their begins in the file (may be < 0)."""
        if T <= 0 or not len(begin_B):
            return
        low_B = np.searchsorted(self._first, begin_B, side="right") - 1
        high_B = np.searchsorted(self._first, begin_B + T, side="left") - 1
        spans = set(zip(low_B.tolist(), high_B.tolist(), strict=True))
        for k in np.unique(np.concatenate([np.arange(a, b + 1) for a, b in spans])).tolist():
            rows = np.flatnonzero((low_B <= k) & (k <= high_B))
            yield k, rows, begin_B[rows] - self._first[k]

    # -------------------------------------------------------------------------------------------------------- documents

    def starts(self, begin_B: Indices, T: int) -> NDArray[np.bool_]:
        """[B, T]: whether a document begins at each token."""
        starts_BT = np.zeros((len(begin_B), T), dtype=np.bool_)
        for k, rows, at_B in self._touched(begin_B, T):
            offsets = self.shards[k].offsets
            if offsets is None:
                offsets = np.zeros(1, dtype=np.int64)  # the begin of the file
                if self.eos_id is not None:
                    self._behind_ends(k, rows, at_B, starts_BT)
            else:
                offsets = offsets[:-1]
            first, last = np.searchsorted(offsets, at_B), np.searchsorted(offsets, at_B + T)
            n_starts = last - first
            row = np.repeat(np.arange(len(rows)), n_starts)
            within = np.arange(len(row)) - np.repeat(np.cumsum(n_starts) - n_starts, n_starts)
            starts_BT[rows[row], offsets[first[row] + within] - at_B[row]] = True
        return starts_BT

    def _behind_ends(self, k: int, rows: Indices, at_B: Indices, starts_BT: NDArray[np.bool_]) -> None:
        ids, T = self.shards[k].ids, starts_BT.shape[1]
        for row, at in zip(rows, at_B, strict=True):
            begin, end = max(at, 1), min(at + T, len(ids))
            if begin < end:
                starts_BT[row, begin - at : end - at] |= ids[begin - 1 : end - 1] == self.eos_id

    @cached_property
    def offsets(self) -> Indices:
        """int64 [n_documents + 1]: begins of documents, and the end. Reads all files if only end tokens tell them."""
        if len(self.shards) == 1:
            return self._offsets_of(self.shards[0])
        parts = [self._offsets_of(shard)[:-1] + first for shard, first in zip(self.shards, self._first, strict=False)]
        return np.concatenate([*parts, self._first[-1:]])

    def _offsets_of(self, shard: Shard) -> Indices:
        if shard.offsets is not None:
            return shard.offsets
        n, found = shard.n_tokens, [np.zeros(1, dtype=np.int64)]
        for begin in range(0, n, _SCANNED) if self.eos_id is not None else ():
            found.append(np.flatnonzero(shard.ids[begin : min(begin + _SCANNED, n - 1)] == self.eos_id) + begin + 1)
        return np.concatenate([*found, [n]])

    @property
    def n_documents(self) -> int:
        return len(self.offsets) - 1

    def numbers(self, begin: int, end: int) -> list[int]:
        """The source item of each document in tokens begin to end - 1; its number in the split, if that is unknown."""
        first = np.searchsorted(self.offsets, begin, side="right") - 1
        documents = np.arange(first, np.searchsorted(self.offsets, end, side="left"))
        found: list[int] = (documents if self._numbers is None else self._numbers[documents]).tolist()
        return found

    @cached_property
    def _numbers(self) -> Indices | None:
        """The source item of each document; None: a shard does not tell."""
        told = [shard.numbers for shard in self.shards if shard.numbers is not None]
        return np.concatenate([numbers() for numbers in told]) if len(told) == len(self.shards) else None

    def beginnings(self, n: int, length: int) -> Iterator[Indices]:
        """The first `length` tokens of the first n documents (or of all), without reading whole files."""
        for first, shard in zip(self._first.tolist(), self.shards, strict=False):
            scanned = shard.part(0, min(shard.n_tokens, _SCANNED)) if shard.offsets is None else shard
            offsets = self._offsets_of(scanned)[: n + 1].tolist()
            for begin, end in itertools.pairwise(offsets):
                yield self.read(first + begin, first + min(end, begin + length))
            n -= len(offsets) - 1

    def document(self, i: int) -> NDArray[Any]:
        begin, end = int(self.offsets[i]), int(self.offsets[i + 1])
        if len(self.shards) == 1:
            ids: NDArray[Any] = self.shards[0].ids[begin:end]
            return ids
        return self.read(begin, end)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "offsets"}

"""Streamed text: tokens by position in the stream, and a position from which to resume.

    rows of the set      0        1     2 (blank)   3 (held out)   4 ...       counted from 0 on in each epoch
    stream of tokens     [a a a a][b b b]                          [c c c c c]

The token stream equals the one a cache would hold; only what the current samples need is in memory. Every rank reads
all of it and takes its own rows, so all ranks make the same steps. A position is the begin of a document: its token in
the stream, its epoch, and its row.
"""

# B batch, T tokens of a window

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from txtrain.data.samples.order import GlobalOrder, Indices
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.errors import ConfigError

ENDLESS = 1 << 60  # tokens, the nominal length of a stream
_TOGETHER = 32  # documents encoded at once

RowsFrom = Callable[[int], Iterator[tuple[int, str]]]  # row and text of the training documents from a row on


class Position(NamedTuple):
    """Where a document begins."""

    token: int = 0
    epoch: int = 0
    row: int = 0


_BEGIN = Position()


class StreamTokens:
    """The training tokens of a streamed set, with what packing reads of `Tokens`. Going back reads from the start."""

    split = "train"
    mask = None
    pairs = False

    def __init__(self, rows_from: RowsFrom, tokenizer: Tokenizer, start: Position = _BEGIN) -> None:
        self.rows_from, self.tokenizer, self.start = rows_from, tokenizer, start
        self._seek(start)

    def _seek(self, start: Position) -> None:
        self._begin = start.token  # of the tokens in memory
        self._end = start.token
        self._documents: deque[tuple[Position, NDArray[np.int64]]] = deque()
        self._source = self._read(start)
        self._reached = start

    def go_to(self, start: Position) -> None:
        """Read on from there."""
        self.start = start
        self._seek(start)

    def __len__(self) -> int:
        return ENDLESS

    @property
    def position(self) -> Position:
        """The last document in the latest windows: reading can resume from there."""
        return self._reached

    @property
    def n_documents(self) -> int:
        return ENDLESS

    @property
    def offsets(self) -> Indices:
        raise ConfigError(
            "`data.streaming` must be false with objective.next_sentence=true, which picks documents at random, "
            "but is true instead."
        )

    # ---------------------------------------------------------------------------------------------------------- reading

    def _read(self, start: Position) -> Iterator[tuple[Position, list[int]]]:
        """Documents from a position on, without end; the next epoch begins after the last row."""
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        row, epoch = start.row, start.epoch
        while True:
            found = 0
            rows = self.rows_from(row)
            while batch := list(itertools.islice(rows, _TOGETHER)):
                encoded = self.tokenizer.encode_batch([text for _, text in batch])
                for (number, _), ids in zip(batch, encoded, strict=True):
                    yield Position(0, epoch, number), [*bos, *ids, self.tokenizer.eos_id]
                found += len(batch)
            if not found and row == 0:
                raise ConfigError("`data` must have training text, but has none: the stream ended without a document.")
            row, epoch = 0, epoch + 1

    def _need(self, begin: int, end: int) -> None:
        """Read tokens begin to end - 1 into memory, and drop those before."""
        if begin < self._begin:
            self._seek(_BEGIN)
        while self._end < end:
            place, ids = next(self._source)
            self._documents.append((place._replace(token=self._end), np.array(ids, dtype=np.int64)))
            self._end += len(ids)
            while self._documents and self._documents[0][0].token + len(self._documents[0][1]) <= begin:
                self._begin += len(self._documents.popleft()[1])
        while self._documents and self._documents[0][0].token + len(self._documents[0][1]) <= begin:
            self._begin += len(self._documents.popleft()[1])
        self._reached = next(place for place, _ in reversed(self._documents) if place.token < end)

    def windows(self, begin_B: Indices, T: int) -> Indices:
        """int64 [B, T]: T tokens from each begin on."""
        self._need(int(begin_B.min()), int(begin_B.max()) + T)
        ids = np.concatenate([ids for _, ids in self._documents])
        found: Indices = np.lib.stride_tricks.sliding_window_view(ids, T)[begin_B - self._begin]
        return found

    def starts(self, begin_B: Indices, T: int) -> NDArray[np.bool_]:
        """[B, T]: whether a document begins at each token."""
        self._need(int(begin_B.min()), int(begin_B.max()) + T)
        marks = np.zeros(self._end - self._begin, dtype=np.bool_)
        marks[[place.token - self._begin for place, _ in self._documents]] = True
        found: NDArray[np.bool_] = np.lib.stride_tricks.sliding_window_view(marks, T)[begin_B - self._begin]
        return found

    def trained(self, begin_B: Indices, T: int) -> None:
        """None: all tokens are trained."""

    def numbers(self, begin: int, end: int) -> list[int]:
        """The row of each document in tokens begin to end - 1."""
        self._need(begin, end)
        return [place.row for place, ids in self._documents if place.token < end and place.token + len(ids) > begin]

    def __getstate__(self) -> dict[str, Any]:
        return {"rows_from": self.rows_from, "tokenizer": self.tokenizer, "start": self.start}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class StreamOrder(GlobalOrder):
    """Samples in the order of the stream, which cannot be shuffled."""

    def rows(self, indices: Indices) -> Indices:
        return indices

"""Streamed text: divided among readers, shuffled by blocks, and a position of each reader from which to resume.

    rows of the set       0 1 2 3 4 5 6 7 8 9 ...    or its files, where there is at least one for each of R readers
    blocks of reader 0    [6 0 4 2][10 8 14 12] ...  its own rows, shuffled within each block
    tokens of reader 0    [6 6 6][0 0][4 4 4 4] ...  cut into its samples: sample i of the run is the (i div R)-th of
                                                     reader i mod R

The readers are fixed by the configuration, so the order does not depend on the processes. A process reads for those
readers alone whose samples it needs. In epoch e reader r has share (r + e) mod R of the rows or files: as these differ
in length, all rows are read equally often in R epochs of every reader. With one reader and no shuffling the tokens
equal those that a cache would hold.
"""

# B batch, T tokens of a window

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from txtrain.data.samples.order import GlobalOrder, Indices, permutation
from txtrain.data.store.stream_position import Position, Positions
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.errors import ConfigError

ENDLESS = 1 << 60  # tokens, the nominal length of a stream
_SPAN = 1 << 46  # of one reader
MOST_READERS = ENDLESS // _SPAN
_TOGETHER = 32  # documents encoded at once
_BLOCK_BYTES = 1 << 22  # of text in a block, for each reader that it is read for
_KEPT = 4  # blocks in memory that readers share


class StreamSource(Protocol):
    """What is streamed. Files and rows are numbered from 0.

    Attributes:
        n_files: that can be read alone.
        by_files: each reader has files of its own, and rows are numbered within each; else it has its share of the
            rows.
    """

    n_files: int
    by_files: bool

    def stream(self, file: int, part: int = 0) -> Iterator[tuple[int, Any]]:
        """The rows of a file from one of its parts on, some at a time: their part, and an Arrow column of bytes."""

    def text(self, raw: bytes | None, number: int, file: int) -> str | None:
        """The text of a row; None: it is not for training."""


class Rows(NamedTuple):
    """Rows in the order of the set. begin: where the first stands; texts: an Arrow column, with null for none."""

    begin: Position
    texts: Any
    numbers: Indices
    files: Indices

    def between(self, first: int, end: int) -> Rows:
        begin = self.begin._replace(row=self.begin.row + first, number=self.begin.number + first)
        return Rows(begin, self.texts[first:end], self.numbers[first:end], self.files[first:end])


class StreamTokens:
    """The training tokens of a streamed set, with what packing reads of `Tokens`: those of reader r begin at token
    r * 2^46. Going back reads from the start.

    Args:
        n_readers: among which the set is divided.
        buffer: rows of a block, within which a reader shuffles; fewer where they hold more than 4 MiB. 0: the order of
            the set.
    """

    split = "train"
    mask = None
    pairs = False

    def __init__(
        self, source: StreamSource, tokenizer: Tokenizer, seed: int = 0, n_readers: int = 1, buffer: int = 0,
        start: Positions | None = None,
    ) -> None:
        self.source, self.tokenizer, self.seed, self.n_readers, self.buffer = source, tokenizer, seed, n_readers, buffer
        self.go_to(start or (Position(),) * n_readers)

    def go_to(self, start: Positions) -> None:
        """Read on from there."""
        self.start = start
        self._readers: dict[int, _Reader] = {}  # those that were needed so far
        self._readings: dict[int, _Reading] = {}  # of each reader; shared, unless they have files of their own

    def __len__(self) -> int:
        return ENDLESS

    @property
    def position(self) -> Indices:
        """[readers, 8]: a `Position` of each reader from which its next windows can be read."""
        return np.array([self._readers[r].reached if r in self._readers else at for r, at in enumerate(self.start)])

    @property
    def n_documents(self) -> int:
        return ENDLESS

    @property
    def offsets(self) -> Indices:
        raise ConfigError(
            "`data.streaming` must be false with objective.next_sentence=true, which picks documents at random, "
            "but is true instead."
        )

    def begins(self, rows: Indices, stride: int) -> Indices:
        """Where samples begin, int64 [B]. rows: their numbers in the run."""
        return rows % self.n_readers * _SPAN + rows // self.n_readers * stride

    def windows(self, begin_B: Indices, T: int) -> Indices:
        """int64 [B, T]: T tokens from each begin on."""
        found_BT = np.empty((len(begin_B), T), dtype=np.int64)
        for reader, which, at_B in self._by_reader(begin_B):
            found_BT[which] = reader.windows(at_B, T)
        return found_BT

    def starts(self, begin_B: Indices, T: int) -> NDArray[np.bool_]:
        """[B, T]: whether a document begins at each token."""
        found_BT = np.empty((len(begin_B), T), dtype=np.bool_)
        for reader, which, at_B in self._by_reader(begin_B):
            found_BT[which] = reader.starts(at_B, T)
        return found_BT

    def trained(self, begin_B: Indices, T: int) -> None:
        """None: all tokens are trained."""

    def numbers(self, begin: int, end: int) -> list[int]:
        """The row of each document in tokens begin to end - 1."""
        return self._reader(begin // _SPAN).numbers(begin % _SPAN, end % _SPAN)

    def _by_reader(self, begin_B: Indices) -> Iterator[tuple[_Reader, Indices, Indices]]:
        of_B = begin_B // _SPAN
        for number in np.unique(of_B).tolist():
            which = np.flatnonzero(of_B == number)
            yield self._reader(number), which, begin_B[which] % _SPAN

    def _reader(self, number: int) -> _Reader:
        if number not in self._readers:
            self._readers[number] = _Reader(self, number, self.start[number])
        return self._readers[number]

    def __getstate__(self) -> dict[str, Any]:
        names = "source", "tokenizer", "seed", "n_readers", "buffer", "start"
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    # ----------------------------------------------------------------------------------------------------------- blocks

    def forget(self, reader: int) -> None:
        """Read the next block of a reader anew."""
        self._readings.pop(reader, None)

    def block(self, reader: int, wanted: int, known: Position) -> Rows:
        """A block of rows for a reader. known: in it or in the one before, which may be read again to reach it."""
        mine = [self._readings[reader]] if reader in self._readings else []
        shared: Iterable[_Reading] = () if self.source.by_files else self._readings.values()
        for reading in (*mine, *shared):
            if (found := reading.block(wanted)) is not None:
                self._readings[reader] = reading
                return found
        if not self.source.by_files:  # readers that resume near each other go on together
            near = (at for at in self.start if wanted - _KEPT < at.block <= known.block)
            known = min((known, *near), key=lambda at: at.block)
        made = self._readings[reader] = _Reading(self._blocks(reader, known), known.block)
        block = made.block(wanted)
        assert block is not None  # it is the first or one of the next
        return block

    def _blocks(self, reader: int, at: Position) -> Iterator[Rows]:
        """Blocks from the begin of one on, without end: in each epoch at least one, if only an empty one."""
        import pyarrow as pa
        import pyarrow.compute as pc

        width = 1 if self.source.by_files else self.n_readers
        most, most_bytes = width * (self.buffer or _TOGETHER), width * _BLOCK_BYTES
        number = at.block
        while True:
            empty = Rows(Position(epoch=at.epoch), pa.array([], pa.large_binary()), *np.empty((2, 0), np.int64))
            parts: list[Rows] = []
            n, size, first = 0, 0, number
            for rows in self._rows(reader, at):
                sizes = pc.fill_null(pc.binary_length(rows.texts), 0).to_numpy(zero_copy_only=False)
                begin, ends = 0, np.cumsum(sizes)
                while begin < len(sizes):
                    left = most_bytes - size + int(ends[begin] - sizes[begin])
                    end = min(begin + most - n, int(np.searchsorted(ends, left, "right")))
                    end = max(end, begin + (not parts))
                    parts.append(rows.between(begin, end))
                    n, size = n + end - begin, size + int(sizes[begin:end].sum())
                    if end < len(sizes) or n == most:
                        yield _joined(parts, number)
                        parts, n, size, number = [], 0, 0, number + 1
                    begin = end
            if parts or number == first:
                yield _joined(parts or [empty], number)
                number += 1
            at = Position(epoch=at.epoch + 1)

    def _rows(self, reader: int, at: Position) -> Iterator[Rows]:
        """The rows of an epoch from the begin of a block on."""
        number, skip = at.number, at.row
        for place, file in enumerate(self._files(reader, at.epoch)):
            if place < at.file:
                continue
            number = 0 if self.source.by_files and place > at.file else number
            last, row = -1, 0
            for part, texts in self.source.stream(file, at.part if place == at.file else 0):
                row = row if part == last else 0  # of the part
                last, begin = part, min(skip, len(texts))
                skip, n = skip - begin, len(texts) - begin
                if n:
                    begins = Position(epoch=at.epoch, file=place, part=part, row=row + begin, number=number)
                    yield Rows(begins, texts[begin:], np.arange(number, number + n), np.full(n, file))
                row, number = row + len(texts), number + n

    def _files(self, reader: int, epoch: int) -> list[int]:
        """The files that a reader reads in an epoch, in order."""
        files = np.arange(self.source.n_files)
        if self.source.by_files:
            files = files[(reader + epoch) % self.n_readers :: self.n_readers]
            files = files[self._shuffled(len(files), reader, epoch)]
        found: list[int] = files.tolist()
        return found

    def own(self, reader: int, block: Rows) -> Indices:
        """The rows of a block that are the reader's, in the order in which it reads them."""
        own = np.arange(len(block.numbers))
        if not self.source.by_files:
            own = own[(block.numbers - reader - block.begin.epoch) % self.n_readers == 0]
        return own[self._shuffled(len(own), reader, block.begin.block)]

    def _shuffled(self, n: int, reader: int, draw: int) -> Indices:
        key = hashlib.blake2b(f"{self.seed}/{reader}".encode(), digest_size=8).digest()
        in_order = np.arange(n)
        return permutation(in_order, n, int.from_bytes(key, "little"), draw) if self.buffer and n else in_order


class _Reading:
    """Blocks that are read one after the other, of which the latest are kept."""

    def __init__(self, blocks: Iterator[Rows], first: int) -> None:
        self._blocks, self._next = blocks, first
        self._kept: deque[Rows] = deque(maxlen=_KEPT)

    def block(self, number: int) -> Rows | None:
        """A kept block, or one of the next; None: it is far off."""
        if not self._next - len(self._kept) <= number < self._next + _KEPT:
            return None
        while self._next <= number:
            self._kept.append(next(self._blocks))
            self._next += 1
        return self._kept[number - self._next]


class _Reader:
    """The tokens of one reader, of which those in memory that the latest windows need.

    Attributes:
        reached: the last document in the latest windows.
    """

    def __init__(self, stream: StreamTokens, number: int, start: Position) -> None:
        self.stream, self.number = stream, number
        self._seek(start)

    def _seek(self, start: Position) -> None:
        self._begin = self._end = start.token  # of the tokens in memory
        self._documents: deque[tuple[Position, int, NDArray[np.int64]]] = deque()
        self._source = self._read(start)
        self.reached = start

    def _read(self, at: Position) -> Iterator[tuple[Position, int, list[int]]]:
        """Place, row and tokens of the documents from one on, without end."""
        import pyarrow as pa

        source, tokenizer, found_in = self.stream.source, self.stream.tokenizer, at.epoch
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        wanted, turn, known = at.block, at.turn, at
        while True:
            block = self.stream.block(self.number, wanted, known)
            own, known = self.stream.own(self.number, block), block.begin
            for first in range(turn, len(own), _TOGETHER):
                some = own[first : first + _TOGETHER]
                raws, numbers = block.texts.take(pa.array(some)).to_pylist(), block.numbers[some].tolist()
                each = map(source.text, raws, numbers, block.files[some].tolist())
                texts = [(i, numbers[i - first], text) for i, text in enumerate(each, first) if text is not None]
                encoded = tokenizer.encode_batch([text for _, _, text in texts]) if texts else []
                for (i, number, _), ids in zip(texts, encoded, strict=True):
                    found_in = known.epoch
                    yield known._replace(turn=i), number, [*bos, *ids, tokenizer.eos_id]
            if known.epoch - found_in > self.stream.n_readers:  # by then it has had each share
                raise ConfigError("`data` must have training text, but has none: the stream ended without a document.")
            wanted, turn = wanted + 1, 0

    def _need(self, begin: int, end: int) -> None:
        """Read tokens begin to end - 1 into memory, and drop those before."""
        if begin < self._begin:
            self.stream.forget(self.number)
            self._seek(Position())
        while True:
            while self._documents and self._documents[0][0].token + len(self._documents[0][2]) <= begin:
                self._begin += len(self._documents.popleft()[2])
            if self._end >= end:
                break
            at, number, ids = next(self._source)
            self._documents.append((at._replace(token=self._end), number, np.array(ids, dtype=np.int64)))
            self._end += len(ids)
        self.reached = next(at for at, _, _ in reversed(self._documents) if at.token < end)

    def windows(self, begin_B: Indices, T: int) -> Indices:
        self._need(int(begin_B.min()), int(begin_B.max()) + T)
        ids = np.concatenate([ids for _, _, ids in self._documents])
        found: Indices = np.lib.stride_tricks.sliding_window_view(ids, T)[begin_B - self._begin]
        return found

    def starts(self, begin_B: Indices, T: int) -> NDArray[np.bool_]:
        self._need(int(begin_B.min()), int(begin_B.max()) + T)
        marks = np.zeros(self._end - self._begin, dtype=np.bool_)
        marks[[at.token - self._begin for at, _, _ in self._documents]] = True
        found: NDArray[np.bool_] = np.lib.stride_tricks.sliding_window_view(marks, T)[begin_B - self._begin]
        return found

    def numbers(self, begin: int, end: int) -> list[int]:
        self._need(begin, end)
        return [row for at, row, ids in self._documents if at.token < end and at.token + len(ids) > begin]


def _joined(parts: Sequence[Rows], number: int) -> Rows:
    """One block of rows that follow each other."""
    import pyarrow as pa

    begins, texts, numbers, files = zip(*parts, strict=True)
    begin = begins[0]._replace(block=number)
    return Rows(begin, pa.concat_arrays(texts), np.concatenate(numbers), np.concatenate(files))


@dataclass(frozen=True)
class StreamOrder(GlobalOrder):
    """Samples by reader: sample i is of reader i mod n_readers. The samples of a step stand so that a contiguous share
    of them is of few readers.
    """

    n_readers: int = 1
    buffer: int = 0

    @property
    def salt(self) -> bytes:
        shuffled = (self.seed, self.buffer) if self.buffer else ()
        return b"" if self.n_readers == 1 and not shuffled else f"{self.n_readers} {shuffled}".encode()

    def indices(self, step: int, n_steps: int = 1) -> Indices:
        groups = math.gcd(self.global_batch_size, self.n_readers)
        by_step = super().indices(step, n_steps).reshape(n_steps, -1, groups)
        return by_step.transpose(0, 2, 1).ravel()

    def rows(self, indices: Indices) -> Indices:
        return indices

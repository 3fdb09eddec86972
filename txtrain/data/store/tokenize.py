"""Tokenise a corpus into a cache folder: documents as (bos +) tokens + eos, on all cores, in one pass."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from txtrain.data.sources.files import Text, chunks_of
from txtrain.data.sources.source import Split, describe, n_bytes, skipped
from txtrain.data.store.cache import TokenWriter
from txtrain.data.store.progress import Progress
from txtrain.data.tokenizer.cuts import Places, cut, places_of
from txtrain.data.tokenizer.tokenizer import Tokenizer, allow_threads
from txtrain.errors import ConfigError

SKIPPED = "skipped_rows.jsonl"
_BATCH = 1 << 20  # characters per batch; each token takes some hundred bytes during encoding


class Piece(NamedTuple):
    split: Split
    text: str
    begins: bool  # its document
    ends: bool


class Documents(Protocol):
    """A corpus: documents with their splits, and their source."""

    @property
    def source(self) -> Any: ...

    def documents(self) -> Iterator[tuple[Split, Text]]: ...


class Writer(Protocol):
    """Where tokens are written, document by document. ends: these are the last of their document."""

    def append(self, split: Split, ids: list[int], ends: bool) -> None: ...


def tokenise(
    corpus: Documents, tokenizer: Tokenizer, folder: Path, with_bos: bool = True, limit: Limit | None = None
) -> None:
    """Tokenise both splits of the corpus into `folder`, in one pass.

    Raises:
        ConfigError: there is more text than the limit allows.
    """
    writer = TokenWriter(folder, tokenizer.vocab_size)
    if limit is not None:
        limit.check(n_bytes(corpus.source) or 0)
    with Progress("tokenising", n_bytes(corpus.source)) as progress, writer.open():
        for size in write_tokens(corpus.documents(), tokenizer, writer, with_bos):
            progress.advance(size)
            if limit is not None:
                limit.check(progress.n_bytes)
    progress.done(f"tokenised {{size}}: {writer.n_tokens:,} tokens in {{seconds}}")
    write_skipped(folder, corpus.source)
    writer.finish(source=describe(corpus.source, type(corpus.source).__name__), tokenizer=tokenizer.fingerprint)


def write_skipped(folder: Path, source: Any) -> None:
    """Write a line of SKIPPED per skipped row, if any, once the source has been read to its end."""
    rows = skipped(source).items()
    lines = (json.dumps({"row": where, "why": why}, ensure_ascii=False) + "\n" for where, why in rows)
    if rows:
        (folder / SKIPPED).write_text("".join(lines), encoding="utf-8")


class Limit(NamedTuple):
    """On text that a run tokenises itself: on several nodes all ranks but one per node would wait."""

    n_bytes: int
    why: str  # such as trainer.num_nodes=4

    def check(self, n_bytes: int) -> None:
        if n_bytes > self.n_bytes:
            raise ConfigError(
                f"`data` must be tokenised beforehand with {self.why} if it is more than {self.n_bytes / 1e9:g} GB, "
                f"and it is {n_bytes / 1e9:.3g} GB or more: txtrain prepare data=... out=DIR (and this run's model, "
                "objective and tokenizer), then data=memmap data.path=DIR."
            )


def write_tokens(
    documents: Iterable[tuple[Split, Text]], tokenizer: Tokenizer, writer: Writer, with_bos: bool = True
) -> Iterator[int]:
    """Write the documents, and yield the number of bytes of text after each batch."""
    allow_threads(True)
    bos = [] if tokenizer.bos_id is None or not with_bos else [tokenizer.bos_id]
    eos = [tokenizer.eos_id]
    for pieces, encoded in _encode(_batches(_pieces(documents, places_of(tokenizer.backend))), tokenizer):
        for piece, ids in zip(pieces, encoded, strict=True):
            writer.append(piece.split, [*(bos if piece.begins else []), *ids, *(eos if piece.ends else [])], piece.ends)
        yield sum(len(piece.text.encode()) for piece in pieces)


def _pieces(documents: Iterable[tuple[Split, Text]], places: Places | None) -> Iterator[Piece]:
    for split, text in documents:
        pieces = cut(chunks_of(text), places)
        last, begins = next(pieces), True
        for piece in pieces:
            yield Piece(split, last, begins, False)
            last, begins = piece, False
        yield Piece(split, last, begins, True)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batches: Iterator[list[Piece]], tokenizer: Tokenizer) -> Iterator[tuple[list[Piece], Iterator[list[int]]]]:
    """Each batch with its ids; the library's threads encode the next one while this thread writes the last."""
    encode = partial(tokenizer.backend.encode_batch_fast, add_special_tokens=False)
    with ThreadPoolExecutor(1) as pool:
        ahead: tuple[list[Piece], Future[Any]] | None = None
        for batch in batches:
            last, ahead = ahead, (batch, pool.submit(encode, [p.text for p in batch]))
            if last:
                yield last[0], (e.ids for e in last[1].result())
        if ahead:
            yield ahead[0], (e.ids for e in ahead[1].result())

"""A corpus to a cache folder: documents as (bos +) tokens + eos, tokenised on all cores while they stream by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from txtrain.data.sources.source import Split, describe, n_bytes
from txtrain.data.store.cache import TokenWriter
from txtrain.data.store.progress import Progress
from txtrain.data.tokenizer.tokenizer import Tokenizer, allow_threads
from txtrain.errors import ConfigError

_PIECE = 1 << 18  # characters: longer documents are encoded in pieces, which keeps memory bounded and all cores busy
_BATCH = 1 << 22  # characters a batch


class Piece(NamedTuple):
    split: Split
    text: str
    begins: bool  # its document
    ends: bool


class Documents(Protocol):
    """A corpus: documents, each with its split; `source` is where they are from."""

    @property
    def source(self) -> Any: ...

    def documents(self) -> Iterator[tuple[Split, str]]: ...


class Writer(Protocol):
    """Where tokens go, document after document; `ends`: these are the last of their document."""

    def append(self, split: Split, ids: list[int], ends: bool) -> None: ...


def tokenise(corpus: Documents, tokenizer: Tokenizer, folder: Path, with_bos: bool = True, limit: Limit | None = None) -> None:
    """Both splits of the corpus into `folder`, in one pass.

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
    writer.finish(source=describe(corpus.source, type(corpus.source).__name__), tokenizer=tokenizer.fingerprint)


class Limit(NamedTuple):
    """Of text that a run tokenises by itself: on many nodes all but one process of each would wait for it."""

    n_bytes: int
    why: str  # such as trainer.num_nodes=4

    def check(self, n_bytes: int) -> None:
        if n_bytes > self.n_bytes:
            raise ConfigError(
                f"`data` must be tokenised beforehand with {self.why} if it is more than {self.n_bytes / 1e9:g} GB, and it is {n_bytes / 1e9:.3g} GB or more: "
                "txtrain prepare data=... out=DIR (and this run's model, objective and tokenizer), then data=memmap data.path=DIR."
            )


def write_tokens(documents: Iterable[tuple[Split, str]], tokenizer: Tokenizer, writer: Writer, with_bos: bool = True) -> Iterator[int]:
    """Write the documents, and yield from time to time how many bytes of text came since the last time."""
    allow_threads(True)
    bos = [] if tokenizer.bos_id is None or not with_bos else [tokenizer.bos_id]
    eos = [tokenizer.eos_id]
    for pieces, encoded in _encode(_batches(_pieces(documents)), tokenizer):
        for piece, ids in zip(pieces, encoded, strict=True):
            writer.append(piece.split, [*(bos if piece.begins else []), *ids, *(eos if piece.ends else [])], piece.ends)
        yield sum(len(piece.text.encode()) for piece in pieces)


def _pieces(documents: Iterable[tuple[Split, str]]) -> Iterator[Piece]:
    for split, text in documents:
        at = 0
        while len(text) - at > _PIECE and (cut := _cut(text, at)):
            yield Piece(split, text[at:cut], at == 0, False)
            at = cut
        yield Piece(split, text[at:], at == 0, True)


def _cut(text: str, at: int) -> int | None:
    """Where the piece from `at` ends: before a run of white space that begins with a line's end; None if there is no such place.

    There GPT-2's pre-tokenizer splits in any case, so that the tokens are those of the whole document. A tokenizer that puts a space
    before each text (SentencePiece's) gets one such token more at each cut.
    """
    cut = text.find("\n", at + _PIECE - (_PIECE >> 3))
    while cut > 0 and text[cut - 1].isspace():
        cut = text.find("\n", cut + 1)
    return cut if cut > at else None


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
    """Each batch with its ids, one batch ahead: the library's threads encode it while this one copies and writes the last."""
    encode = partial(tokenizer.backend.encode_batch_fast, add_special_tokens=False)
    with ThreadPoolExecutor(1) as pool:
        ahead: tuple[list[Piece], Future[Any]] | None = None
        for batch in batches:
            last, ahead = ahead, (batch, pool.submit(encode, [p.text for p in batch]))
            if last:
                yield last[0], (e.ids for e in last[1].result())
        if ahead:
            yield ahead[0], (e.ids for e in ahead[1].result())

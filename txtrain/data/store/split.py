"""Training and validation text of a source, without overlap.

A source with a validation split keeps it. Otherwise `val_fraction` of the text is held out, by a rule that depends on
the order of documents alone:

- many documents (at least 5 / val_fraction, 100 for 5 %): one whole document, by a hash, of each 1 / val_fraction;
- fewer: the end of each document after 1 - val_fraction of it, from the next line on, or else the next word.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from txtrain.data.sources.files import Text
from txtrain.data.sources.source import (
    SPLITS,
    Marked,
    MarkedSource,
    Split,
    TextSource,
    has_validation,
    hashed,
    identity,
    splits,
)
from txtrain.data.tokenizer.tokenizer import Tokenizer

FORMAT = 1  # part of fingerprints: raise it when the split, the tokens or their files change
_MANY = 5  # whole documents are held out if they are at least so many


@dataclass(frozen=True)
class Corpus:
    """Documents of a source, each with its split; the same at every pass."""

    source: TextSource
    val_fraction: float

    def documents(self) -> Iterator[tuple[Split, Text]]:
        """(split, text), without blank texts."""
        if not has_validation(self.source):
            yield from split_documents(lambda: _written(self.source.documents("train")), self.val_fraction)
            return
        for split in ("train", "validation"):
            for text in _written(self.source.documents(split)):
                yield split, text

    def training_texts(self) -> Iterator[Text]:
        if has_validation(self.source):
            return _written(self.source.documents("train"))
        return (text for split, text in self.documents() if split == "train")

    @cached_property
    def fingerprint(self) -> str:
        """Of text and split."""
        return digest(FORMAT, _known(self.source), None if has_validation(self.source) else self.val_fraction)


@dataclass(frozen=True)
class MarkedCorpus:
    """Texts with a mask of trained tokens. Without a validation split whole items are held out, at least one."""

    source: MarkedSource
    val_fraction: float
    tokenizer: Tokenizer
    whole: bool = False  # all training texts are for validation

    def documents(self) -> Iterator[tuple[Split, Marked]]:
        if self.whole:
            yield from (("validation", text) for text in self.source.marked("train", self.tokenizer))
            return
        if has_validation(self.source):
            for split in SPLITS:
                yield from ((split, text) for text in self.source.marked(split, self.tokenizer))
            return
        items = itertools.groupby(self.source.marked("train", self.tokenizer), key=lambda text: text.number)
        run = round(1 / self.val_fraction)
        first = [(number, list(texts)) for number, texts in itertools.islice(items, run)]
        few = len(first) < run and not any(is_held_out(number, self.val_fraction) for number, _ in first)
        for k, (number, texts) in enumerate(itertools.chain(first, items)):
            held = k == len(first) - 1 > 0 if few else is_held_out(number, self.val_fraction)
            yield from (("validation" if held else "train", text) for text in texts)

    @property
    def fingerprint(self) -> str:
        """Of the source and its chat template; the fingerprint of the tokenizer is separate."""
        template = self.tokenizer.chat_template
        written = None if template is None else [dict(template.texts), dict(self.tokenizer.names)]
        known = Corpus(self.source, self.val_fraction).fingerprint
        return digest("marked whole" if self.whole else "marked", known, written)


@dataclass(frozen=True)
class ValidationSet:
    """All documents of a source, for validation."""

    source: TextSource

    def documents(self) -> Iterator[tuple[Split, Text]]:
        return (("validation", text) for text in _written(self.source.documents("train")))

    @cached_property
    def fingerprint(self) -> str:
        return digest(FORMAT, "validation set", _known(self.source))


@dataclass(frozen=True)
class Corpora:
    """Several corpora, for training one tokenizer on all of them."""

    corpora: tuple[Corpus, ...]

    def training_texts(self) -> Iterator[Text]:
        return itertools.chain.from_iterable(corpus.training_texts() for corpus in self.corpora)

    @cached_property
    def fingerprint(self) -> str:
        return digest("corpora", *(corpus.fingerprint for corpus in self.corpora))


def _known(source: TextSource) -> str:
    return identity(
        source, lambda: hashed((split, text) for split in splits(source) for text in source.documents(split))
    )


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _written(texts: Iterable[Text]) -> Iterator[Text]:
    return (text for text in texts if text and not text.isspace())


def split_documents(texts: Callable[[], Iterator[Text]], val_fraction: float) -> Iterator[tuple[Split, Text]]:
    """(split, text). texts: returns a new iterator over all of them at each call, so that none is kept."""
    many = round(_MANY / val_fraction)
    if sum(1 for _ in itertools.islice(texts(), many)) == many:
        for k, text in enumerate(texts()):
            yield ("validation" if is_held_out(k, val_fraction) else "train"), text
        return
    for text in texts():
        cut = _cut(text, val_fraction)
        yield "train", text[:cut]
        if cut < len(text) and not text[cut:].isspace():
            yield "validation", text[cut:]


def is_held_out(k: int, fraction: float) -> bool:
    """Whether item k is for validation: one item of each run of 1 / fraction, so that all parts are represented."""
    run = int(k * fraction)
    begin, end = _first_of(run, fraction), _first_of(run + 1, fraction)
    draw = int.from_bytes(hashlib.sha256(str(run).encode()).digest()[:8], "little")
    return k == begin + draw % (end - begin)


def held_out(n: int, fraction: float) -> NDArray[np.bool_]:
    """`is_held_out` of n items, [n]."""
    return np.array([is_held_out(k, fraction) for k in range(n)], dtype=np.bool_)


def _first_of(run: int, fraction: float) -> int:
    """The smallest k with int(k * fraction) == run; searched, because a division rounds differently."""
    k = max(0, int(run / fraction) - 1)
    while int(k * fraction) < run:
        k += 1
    return k


def _cut(text: Text, val_fraction: float) -> int:
    """Where the held-out end of a document begins; its length, if it is too short to divide."""
    want = round(len(text) * (1 - val_fraction))
    line = text.find("\n", want) + 1
    if line and line < len(text):
        return line
    word = text.find(" ", want) + 1
    return word if word and word < len(text) else len(text)

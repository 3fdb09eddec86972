"""Rows of texts: their split, and their texts as documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

from txtrain.data.sources.source import Split, has_validation, hashed, identity, side_of, splits
from txtrain.data.store.split import FORMAT, digest

Row = TypeVar("Row")


@dataclass(frozen=True)
class RowCorpus(Generic[Row]):
    """A source's rows, each of a few texts, which are its documents.

    Without a validation split, rows are held out by a hash of their first text: equal texts are on one side.
    """

    source: Any
    val_fraction: float
    whole: bool = False  # all training rows are for validation

    kind: ClassVar[str]  # part of the fingerprint

    def read(self, split: Split) -> Iterator[Row]:
        raise NotImplementedError

    def texts(self, row: Row) -> Sequence[str]:
        raise NotImplementedError

    def content(self) -> Iterator[tuple[Split, str]]:
        """All that makes the rows what they are, for a source that cannot tell its identity."""
        return self.documents()

    def rows(self) -> Iterator[tuple[Split, Row]]:
        own = splits(self.source)[: 1 if self.whole else 2]
        for split in own:
            for row in self.read(split):
                alone = "validation" if self.whole else side_of(self.texts(row)[0], self.val_fraction)
                yield (split if len(own) == 2 else alone), row

    def documents(self) -> Iterator[tuple[Split, str]]:
        return ((split, text) for split, row in self.rows() for text in self.texts(row))

    def training_texts(self) -> Iterator[str]:
        """All texts of a row, since one tokenizer serves them."""
        return (text for split, text in self.documents() if split == "train")

    @cached_property
    def fingerprint(self) -> str:
        known = identity(self.source, lambda: hashed(self.content()))
        held = None if has_validation(self.source) else self.val_fraction
        return digest(FORMAT, self.kind, known, "whole" if self.whole else held)

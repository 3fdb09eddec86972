"""What data are once they are prepared: both splits, ready to read."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from txtrain.data.samples.order import Indices
from txtrain.data.samples.rows import Rows
from txtrain.data.store.stream import StreamTokens
from txtrain.data.store.tokenize import SKIPPED
from txtrain.data.store.tokens import Tokens
from txtrain.data.tokenizer.tokenizer import Tokenizer


@dc.dataclass(frozen=True)
class Prepared:
    """Both splits, ready to read.

    Attributes:
        fingerprint: of contents, tokenizer and packing.
        lengths: of the training rows, if samples are batched by length.
        text: the validation documents, if there are documents.
        named: named validation sets; `validation` is all of them.
        stream: the training tokens, if they are streamed.
        shares: of a mixture, per source: its number of rows and its share of the samples.
        skipped: files that list the skipped rows, one per line.
    """

    train: Rows
    validation: Rows
    fingerprint: str
    tokenizer: Tokenizer | None = None
    lengths: Indices | None = None
    text: Tokens | None = None
    named: Mapping[str, Rows] = dc.field(default_factory=dict)
    shares: Mapping[str, tuple[int, Fraction]] = dc.field(default_factory=dict)
    stream: StreamTokens | None = None
    skipped: tuple[Path, ...] = ()

    @property
    def n_skipped(self) -> int:
        return sum(1 for file in self.skipped for _ in file.open("rb"))


def skipped_in(*folders: Path) -> tuple[Path, ...]:
    """The lists of skipped rows in these folders."""
    return tuple(folder / SKIPPED for folder in folders if (folder / SKIPPED).exists())

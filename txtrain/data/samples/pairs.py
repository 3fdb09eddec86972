"""Pairs of texts: their split, and batches of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from txtrain.data.samples.draws import Draws
from txtrain.data.samples.length_order import padded_length
from txtrain.data.samples.order import Indices
from txtrain.data.samples.row_corpus import RowCorpus
from txtrain.data.samples.rows import Rows, mask_of, padded
from txtrain.data.sources.source import Split
from txtrain.data.store.tokens import Tokens
from txtrain.data.tokenizer.tokenizer import Tokenizer

Pair = tuple[str, str]


class PairSource(Protocol):
    def pairs(self, split: Split) -> Iterator[Pair]: ...


class PairCorpus(RowCorpus[Pair]):
    """The source of a pair, then its target; pairs with a blank side are left out."""

    source: PairSource
    kind = "pairs"

    def read(self, split: Split) -> Iterator[Pair]:
        return (pair for pair in self.source.pairs(split) if pair[0].strip() and pair[1].strip())

    def texts(self, row: Pair) -> Sequence[str]:
        return row


class PairSamples(Rows):
    """Row i is the i-th pair with at most seq_len tokens on each side, end token included.

    tokens: documents 2 k and 2 k + 1 are the sides of pair k, each followed by the end token.
    """

    def __init__(self, tokens: Tokens, tokenizer: Tokenizer, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        self.pad_id = tokenizer.padding_id
        longer = np.diff(tokens.offsets).reshape(-1, 2).max(axis=1)
        self.n_all = len(longer)
        self.kept = np.flatnonzero(longer <= seq_len)
        self.lengths: Indices = longer[self.kept]

    def __len__(self) -> int:
        return len(self.kept)

    def sources(self, rows: Indices) -> list[list[int]]:
        return [[number] for number in self.kept[rows].tolist()]

    def batch(self, rows: Indices, draws: Draws | None = None) -> dict[str, Tensor]:
        """input_ids, attention_mask [B, S], labels [B, T], int64; right-padded to a multiple of 8, labels with -100."""
        source, mask = self._side(2 * self.kept[rows], self.pad_id)
        labels, _ = self._side(2 * self.kept[rows] + 1, -100)
        return {"input_ids": source, "attention_mask": mask, "labels": labels}

    def _side(self, documents: Indices, fill: int) -> tuple[Tensor, Tensor]:
        texts = [self.tokens.document(int(i)) for i in documents]
        longest = padded_length(max(map(len, texts)), self.seq_len)
        return padded(texts, fill, longest), mask_of(texts, longest)

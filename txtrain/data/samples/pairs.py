"""Pairs of texts: their split, and batches of their tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from txtrain.data.samples.draws import Draws
from txtrain.data.samples.length_order import BUCKET
from txtrain.data.samples.order import Indices
from txtrain.data.samples.rows import Rows
from txtrain.data.sources.source import Split, has_validation, hashed, identity, splits
from txtrain.data.store.split import FORMAT, digest
from txtrain.data.store.tokens import Tokens
from txtrain.data.tokenizer.tokenizer import Tokenizer

Pair = tuple[str, str]


class PairSource(Protocol):
    def pairs(self, split: Split) -> Iterator[Pair]: ...


@dataclass(frozen=True)
class PairCorpus:
    """A source's pairs as documents: the source of a pair, then its target.

    Without a validation split, pairs are held out by a hash of the source text: equal texts are on one side.
    """

    source: PairSource
    val_fraction: float
    whole: bool = False  # all training pairs are for validation

    def pairs(self) -> Iterator[tuple[Split, Pair]]:
        """The pairs without a blank side."""
        own = splits(self.source)[: 1 if self.whole else 2]
        for split in own:
            for pair in self.source.pairs(split):
                if pair[0].strip() and pair[1].strip():
                    alone = "validation" if self.whole else side_of(pair[0], self.val_fraction)
                    yield (split if len(own) == 2 else alone), pair

    def documents(self) -> Iterator[tuple[Split, str]]:
        for split, pair in self.pairs():
            for text in pair:
                yield split, text

    def training_texts(self) -> Iterator[str]:
        """Both sides, since one tokenizer serves both."""
        return (text for split, pair in self.pairs() if split == "train" for text in pair)

    @cached_property
    def fingerprint(self) -> str:
        known = identity(self.source, lambda: hashed(self.documents()))
        held = None if has_validation(self.source) else self.val_fraction
        return digest(FORMAT, "pairs", known, "whole" if self.whole else held)


def side_of(text: str, val_fraction: float) -> Split:
    """The split of all rows with this text, where the source has no validation split."""
    draw = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return "validation" if draw < val_fraction * 2**64 else "train"


class PairSamples(Rows):
    """Row i is the i-th pair with at most seq_len tokens on each side, end token included.

    tokens: documents 2 k and 2 k + 1 are the sides of pair k, each followed by the end token.
    """

    def __init__(self, tokens: Tokens, tokenizer: Tokenizer, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        self.pad_id = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
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
        longest = min(-(-max(map(len, texts)) // BUCKET) * BUCKET, self.seq_len)
        ids = np.full((len(texts), longest), fill, dtype=np.int64)
        mask = np.zeros((len(texts), longest), dtype=np.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
            mask[row, : len(text)] = 1
        return torch.from_numpy(ids), torch.from_numpy(mask)

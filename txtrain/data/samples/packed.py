"""Samples of seq_len tokens, cut at read time from one stream of documents.

                 T = 5, a stride of 4: a sample's last token is the next one's first
    stream    a a a b b b b c c c c c ...
    sample 0  a a a b b
    sample 1          b b b c c
    sample 2                  c c c c c

A causal model predicts labels[:, t+1] from position t, so the first token of a sample is never a target: with this
overlap every token of the stream is a target exactly once. Bidirectional models have no overlap. One cache serves
every seq_len.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from txtrain.data.samples.draws import Draws
from txtrain.data.samples.order import Indices
from txtrain.data.samples.rows import Rows
from txtrain.data.store.tokens import Tokens

_TOGETHER = 1 << 12  # rows whose masks are read at once


class PackedSamples(Rows):
    """Row i covers stream[i * (seq_len - overlap) :][:seq_len]; a shorter rest at the end is left out.

    If only some tokens are trained, rows without any are left out too.
    """

    def __init__(self, tokens: Tokens, seq_len: int, cross_document_attention: bool = False, overlap: int = 1) -> None:
        self.tokens, self.seq_len, self.cross_document_attention = tokens, seq_len, cross_document_attention
        self.overlap, self.stride = overlap, seq_len - overlap
        self._n = max(0, (len(tokens) - overlap) // self.stride)
        self.kept: Indices | None = None  # rows, by their place in the stream; None: all
        if tokens.mask is not None:
            begins = np.arange(self._n) * self.stride
            chunks = np.split(begins, range(_TOGETHER, len(begins), _TOGETHER))
            trained = [tokens.mask.windows(chunk, seq_len)[:, overlap:].any(axis=1) for chunk in chunks]
            self.kept = begins[np.concatenate(trained)]

    def __len__(self) -> int:
        return self._n if self.kept is None else len(self.kept)

    def _begins(self, rows: Indices) -> Indices:
        return self.tokens.begins(rows, self.stride) if self.kept is None else self.kept[rows]

    def places(self, rows: Indices) -> Indices:
        """The place of each token in the stream of tokens, int64 [B, T]."""
        return self._begins(rows)[:, None] + np.arange(self.seq_len)

    def sources(self, rows: Indices) -> list[list[int]]:
        return [self.tokens.numbers(begin, begin + self.seq_len) for begin in self._begins(rows).tolist()]

    def batch(self, rows: Indices, draws: Draws | None = None) -> dict[str, Tensor]:
        """input_ids and labels, int64 [B, T]; document_ids, from 0 in each row, without cross-document attention.

        Labels are -100 at the first token of each document, which nothing before it predicts, and at tokens that are
        not trained.
        """
        begin = self._begins(rows)
        input_ids = torch.from_numpy(self.tokens.windows(begin, self.seq_len))
        labels = input_ids.clone()
        if (trained := self.tokens.trained(begin, self.seq_len)) is not None:
            labels[~torch.from_numpy(trained)] = -100
        if self.cross_document_attention:
            return {"input_ids": input_ids, "labels": labels}
        starts = torch.from_numpy(self.tokens.starts(begin, self.seq_len))
        labels[starts] = -100
        starts[:, 0] = False  # the first document of a row is number 0, whether or not it begins here
        return {"input_ids": input_ids, "labels": labels, "document_ids": starts.cumsum(1)}

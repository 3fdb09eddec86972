"""Sequences for evaluation: every token of the stream is predicted once, the shorter rest at its end too.

                 T = 5, a stride of 2: a sequence predicts (upper case) what the one before it has not
    stream    a a a b b b b c c c
    sample 0  A A A B B
    sample 1      a b b B B
    sample 2          b b b C C
    sample 3              b c c C         the rest, padded in a batch

With a smaller stride each token is predicted from more of what precedes it, at the price of more sequences.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from txtrain.data.samples.draws import Draws
from txtrain.data.samples.order import Indices
from txtrain.data.samples.rows import Rows
from txtrain.data.store.tokens import Tokens


class WindowSamples(Rows):
    """Row i covers at most seq_len tokens from i * stride on."""

    def __init__(
        self, tokens: Tokens, seq_len: int, cross_document_attention: bool, stride: int, pad_id: int
    ) -> None:
        self.tokens, self.seq_len, self.stride, self.pad_id = tokens, seq_len, stride, pad_id
        self.cross_document_attention = cross_document_attention
        self._n = 1 + max(0, -(-(len(tokens) - seq_len) // stride)) if len(tokens) > 1 else 0

    def __len__(self) -> int:
        return self._n

    def sources(self, rows: Indices) -> list[list[int]]:
        return [self.tokens.numbers(begin, self._end(begin)) for begin in (rows * self.stride).tolist()]

    def _end(self, begin: int) -> int:
        return min(begin + self.seq_len, len(self.tokens))

    def batch(self, rows: Indices, draws: Draws | None = None) -> dict[str, Tensor]:
        """As of `PackedSamples`, and attention_mask (0: padding) if a row is shorter than another. Labels are also -100
        at tokens that the row before predicts, and at padding, which is a document of its own."""
        begins = rows * self.stride
        lengths = np.array([self._end(begin) - begin for begin in begins.tolist()])
        T = int(lengths.max())
        ids_BT = np.full((len(rows), T), self.pad_id, dtype=np.int64)
        counted_BT, starts_BT = np.zeros((2, len(rows), T), dtype=np.bool_)
        for n in np.unique(lengths).tolist():
            same = np.flatnonzero(lengths == n)
            ids_BT[same, :n] = self.tokens.windows(begins[same], n)
            starts_BT[same, :n] = self.tokens.starts(begins[same], n)
            trained = self.tokens.trained(begins[same], n)
            counted_BT[same, :n] = True if trained is None else trained
            starts_BT[same, n : n + 1] = True
        seen = np.where(rows > 0, self.seq_len - self.stride, 0)  # by the row before
        counted_BT &= np.arange(T) >= seen[:, None]
        ids, starts = torch.from_numpy(ids_BT), torch.from_numpy(starts_BT)
        labels = ids.masked_fill(~torch.from_numpy(counted_BT), -100)
        made = {"input_ids": ids, "labels": labels}
        if (lengths < T).any():
            made["attention_mask"] = torch.from_numpy(np.arange(T) < lengths[:, None]).long()
        if self.cross_document_attention:
            return made
        labels[starts] = -100
        starts[:, 0] = False  # the first document of a row is number 0, whether or not it begins here
        return {**made, "document_ids": starts.cumsum(1)}

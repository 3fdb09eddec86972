"""Samples of seq_len tokens, cut from one stream of documents when they are read.

                 T = 5, a stride of 4: a sample's last token is the next one's first
    stream    a a a b b b b c c c c c ...
    sample 0  a a a b b
    sample 1          b b b c c
    sample 2                  c c c c c

A causal model predicts labels[:, t+1] from position t, so the first token of a sample is never a target: with that overlap every token
of the stream is a target exactly once. Where a token may be predicted from both sides there is none.
Packing happens at read time from the documents' offsets; one cache serves every seq_len.
"""

from __future__ import annotations

import torch
from torch import Tensor

from txtrain.data.samples.draws import Draws
from txtrain.data.samples.order import Indices
from txtrain.data.store.tokens import Tokens


class PackedSamples:
    """Row i covers stream[i * (seq_len - overlap) :][:seq_len]. Shorter than one sample at the end: left out."""

    def __init__(self, tokens: Tokens, seq_len: int, cross_document_attention: bool = False, overlap: int = 1) -> None:
        self.tokens, self.seq_len, self.cross_document_attention = tokens, seq_len, cross_document_attention
        self.overlap, self.stride = overlap, seq_len - overlap

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - self.overlap) // self.stride)

    def batch(self, rows: Indices, draws: Draws | None = None) -> dict[str, Tensor]:
        """input_ids and labels, int64 [B, T]; document_ids, int64 [B, T] from 0 in each row, unless documents may see each other.

        One gather for the whole batch. Labels are -100 at the first token of each document: nothing before it tells what it is.
        """
        begin = rows * self.stride
        input_ids = torch.from_numpy(self.tokens.windows(begin, self.seq_len))
        if self.cross_document_attention:
            return {"input_ids": input_ids, "labels": input_ids.clone()}
        starts = torch.from_numpy(self.tokens.starts(begin, self.seq_len))
        labels = input_ids.masked_fill(starts, -100)
        starts[:, 0] = False  # the row's first document is number 0, whether it begins here or before
        return {"input_ids": input_ids, "labels": labels, "document_ids": starts.cumsum(1)}

"""Rows of whole documents: best-fit-decreasing bin packing (Ding et al. 2024, 2404.10830).

    documents of 3, 5, 2, 4, 1 tokens, seq_len = 6      [b b b b b e] [d d d d c c] [a a a . . .]

Documents longer than seq_len, and no others, are cut into pieces of seq_len and a rest. The pieces of a window of
documents go, the longest first, into the row with the least room left that fits them; the rest of a row is padding.
Each token is in exactly one row. The pieces of each row are written to the cache once; the order of rows is arithmetic.

If only some tokens are trained, the pieces of a cut document overlap by one token, so that every trained token has a
token before it in its row; pieces without a trained token are left out.
"""

# B batch, T tokens of a row

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from txtrain.data.samples.draws import Draws
from txtrain.data.samples.order import Indices
from txtrain.data.samples.rows import Rows
from txtrain.data.store.tokens import Tokens
from txtrain.ground.plain_files import map_npy

FORMAT = "best fit 1"
PLAN_FILES = ("begins.npy", "lengths.npy", "rows.npy")
_WINDOW = 1 << 16  # documents packed together


def write_plan(
    tokens: Tokens, seq_len: int, folder: Path, together: bool = True, each: int = 1, overlap: bool = False
) -> None:
    """Write the begins and lengths of the pieces, row by row, and the number of the first piece of each row.

    together: several pieces per row; else each piece has its own row.
    each: so many neighbouring documents are one piece; if more than 1, it is never cut, but left out if too long.
    overlap: pieces of a document share a token, as they do where only some are trained.
    """
    begins, lengths, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    offsets = tokens.offsets[::each]
    for first in range(0, len(offsets) - 1, _WINDOW):
        mask, within = tokens.mask, np.asarray(offsets[first : first + _WINDOW + 1])
        begin, length = pieces(within, seq_len, overlap=int(overlap or mask is not None))
        if each > 1:
            begin, length = (values[np.diff(within) <= seq_len] for values in (within[:-1], np.diff(within)))
        if mask is not None:
            some = [bool(mask.read(b + 1, b + n).any()) for b, n in zip(begin.tolist(), length.tolist(), strict=True)]
            begin, length = begin[some], length[some]
        rows = list(best_fit_decreasing(length, seq_len)) if together else [[i] for i in range(len(length))]
        order = np.array([i for row in rows for i in row], dtype=np.int64)
        begins.append(begin[order])
        lengths.append(length[order])
        sizes.append(np.array([len(row) for row in rows], dtype=np.int64))
    np.save(folder / "begins.npy", np.concatenate(begins))
    np.save(folder / "lengths.npy", np.concatenate(lengths))
    np.save(folder / "rows.npy", np.concatenate(([0], np.cumsum(np.concatenate(sizes)))))


def pieces(offsets: Indices, seq_len: int, overlap: int = 0) -> tuple[Indices, Indices]:
    """Begins and lengths of the pieces of documents that begin at offsets[:-1] and end at offsets[1:].

    overlap: tokens that a piece shares with the one before it.
    """
    sizes, stride = np.diff(offsets), seq_len - overlap
    n_pieces = np.maximum(-(-(sizes - overlap) // stride), np.minimum(sizes, 1))
    document = np.repeat(np.arange(len(sizes)), n_pieces)
    within = np.arange(len(document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
    begin = offsets[document] + within * stride
    return begin, np.minimum(seq_len, offsets[document + 1] - begin)


def best_fit_decreasing(lengths: Indices, seq_len: int) -> Iterator[list[int]]:
    """Rows: lists of pieces by number, with at most seq_len tokens together. lengths: of pieces, at most seq_len."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # rows by the number of free tokens
    rooms: list[int] = []  # the keys with rows, ascending
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        at = bisect.bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(i)
        if left := room - length:
            if not with_room[left]:
                bisect.insort(rooms, left)
            with_room[left].append(row)
    yield from rows


class BestFitSamples(Rows):
    """Rows of a plan that `write_plan` left in `folder`."""

    each = 1  # documents of a piece

    def __init__(
        self, tokens: Tokens, seq_len: int, folder: Path, pad_id: int, cross_document_attention: bool = False,
        overlap: bool = False,
    ) -> None:
        """overlap: as of `write_plan`."""
        self.tokens, self.seq_len, self.pad_id = tokens, seq_len, pad_id
        self.overlap = overlap or tokens.mask is not None
        self.cross_document_attention = cross_document_attention
        self.begins, self.lengths, self.rows = (
            map_npy(folder / f"{name}.npy") for name in ("begins", "lengths", "rows")
        )

    def __len__(self) -> int:
        return len(self.rows) - 1

    def sources(self, rows: Indices) -> list[list[int]]:
        places = [self.begins[slice(*self.rows[row : row + 2])].tolist() for row in rows]
        return [[n for begin in begins for n in self.tokens.numbers(begin, begin + 1)] for begins in places]

    def batch(self, rows: Indices, draws: Draws | None = None) -> dict[str, Tensor]:
        """input_ids, labels, attention_mask (0: padding), int64 [B, T]; document_ids, without cross-document attention:
        0 for the first piece of a row, and so on; padding counts as one. Labels are -100 at the first token of each
        piece, at padding, and at tokens that are not trained."""
        shape = len(rows), self.seq_len
        ids_BT, mask_BT = np.full(shape, self.pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        unread_BT, documents_BT = np.ones(shape, dtype=np.bool_), np.zeros(shape, dtype=np.int64)
        mask = self.tokens.mask
        for b, row in enumerate(rows.tolist()):
            at = 0
            for number, i in enumerate(range(int(self.rows[row]), int(self.rows[row + 1]))):
                begin, length = int(self.begins[i]), int(self.lengths[i])
                ids_BT[b, at : at + length] = self.tokens.read(begin, begin + length)
                documents_BT[b, at : at + length] = number * self.each + self._within(begin, length)
                unread_BT[b, at : at + length] = mask is not None and mask.read(begin, begin + length) == 0
                # The first token of a later piece is trained in the piece before it.
                unread_BT[b, at] |= self.overlap or not self.cross_document_attention
                at += length
            mask_BT[b, :at] = 1
            documents_BT[b, at:] = (number + 1) * self.each
        ids, unread = torch.from_numpy(ids_BT), torch.from_numpy(unread_BT)
        made = {"input_ids": ids, "labels": ids.masked_fill(unread, -100), "attention_mask": torch.from_numpy(mask_BT)}
        return made if self.cross_document_attention else {**made, "document_ids": torch.from_numpy(documents_BT)}

    def places(self, rows: Indices) -> Indices:
        """The place of each token in the stream of tokens, int64 [B, T]; -1: padding."""
        found_BT = np.full((len(rows), self.seq_len), -1, dtype=np.int64)
        for b, row in enumerate(rows.tolist()):
            here = slice(*self.rows[row : row + 2])
            pieces = zip(self.begins[here].tolist(), self.lengths[here].tolist(), strict=True)
            ids = np.concatenate([np.arange(begin, begin + n) for begin, n in pieces])
            found_BT[b, : len(ids)] = ids
        return found_BT

    def _within(self, begin: int, length: int) -> Indices | int:
        """The number of each token's document among those of its piece, [length]."""
        return 0


class PreferenceSamples(BestFitSamples):
    """Rows of pairs: documents 2 k and 2 k + 1 of a row are the preferred answer of its pair k and the other one."""

    each = 2
    reference: Path | None = None  # a file of float32 [pairs, 2]: log-probabilities of both answers of each pair

    def batch(self, rows: Indices, draws: Draws | None = None) -> dict[str, Tensor]:
        """As BestFitSamples; with `reference` also reference_log_probs, float32 [B, pairs_of(T), 2]."""
        made = super().batch(rows, draws)
        if self.reference is None:
            return made
        known, found = map_npy(self.reference), np.zeros((len(rows), pairs_of(self.seq_len), 2), np.float32)
        for b, pairs in enumerate(self.pairs(rows)):
            found[b, : len(pairs)] = known[pairs]
        return {**made, "reference_log_probs": torch.from_numpy(found)}

    def pairs(self, rows: Indices) -> list[Indices]:
        """The numbers of the pairs in each row."""
        begins = [self.begins[slice(*self.rows[row : row + 2])] for row in rows.tolist()]
        return [np.searchsorted(self.tokens.offsets[::2], some) for some in begins]

    def _within(self, begin: int, length: int) -> Indices:
        starts = self.tokens.starts(np.array([begin]), length)[0]
        return np.cumsum(starts) - 1


def pairs_of(seq_len: int) -> int:
    """The most pairs of a row: an answer has a token that is trained, and one before it."""
    return max(1, seq_len // 4)

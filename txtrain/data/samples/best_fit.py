"""Rows of whole documents: best-fit-decreasing bin packing (Ding et al. 2024, 2404.10830).

    documents of 3, 5, 2, 4, 1 tokens, seq_len = 6      [b b b b b e] [d d d d c c] [a a a . . .]

A document longer than seq_len is cut into pieces of seq_len and a rest; one that is not is never cut. Pieces of a window of documents
are put, the longest first, each into the row that it leaves least room in. What stays free is padding, which no loss reads and no
document sees. Each token is in exactly one row. Which pieces a row holds is written to the cache once; the order of rows is arithmetic.

Where only some tokens are trained, a piece of a document that is cut begins with the last token of the piece before it,
so that every trained token has a token before it in its row; pieces that would train nothing are left out.
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
_WINDOW = 1 << 16  # documents that are packed together


def write_plan(tokens: Tokens, seq_len: int, folder: Path, together: bool = True) -> None:
    """Which pieces each row holds: begins and lengths of pieces, row after row, and where each row begins among them.

    together: else each piece has a row of its own.
    """
    begins, lengths, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    offsets = tokens.offsets
    for first in range(0, len(offsets) - 1, _WINDOW):
        mask, within = tokens.mask, np.asarray(offsets[first : first + _WINDOW + 1])
        begin, length = pieces(within, seq_len, overlap=int(mask is not None))
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
    """Rows, each a list of pieces by number, whose lengths (at most seq_len each) are seq_len together at most."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # rows by how many tokens still fit
    rooms: list[int] = []  # its keys that have rows, ascending
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

    def __init__(self, tokens: Tokens, seq_len: int, folder: Path, pad_id: int, cross_document_attention: bool = False) -> None:
        self.tokens, self.seq_len, self.pad_id, self.cross_document_attention = tokens, seq_len, pad_id, cross_document_attention
        self.begins, self.lengths, self.rows = (
            map_npy(folder / f"{name}.npy") for name in ("begins", "lengths", "rows")
        )

    def __len__(self) -> int:
        return len(self.rows) - 1

    def sources(self, rows: Indices) -> list[list[int]]:
        places = [self.begins[slice(*self.rows[row : row + 2])].tolist() for row in rows]
        return [[n for begin in begins for n in self.tokens.numbers(begin, begin + 1)] for begins in places]

    def batch(self, rows: Indices, draws: Draws | None = None) -> dict[str, Tensor]:
        """input_ids, labels, attention_mask (0: padding), int64 [B, T]; document_ids, unless documents may see each other: a row's
        pieces from 0 on, its padding one of its own. Labels are -100 at the first token of each piece, at padding, and
        where a token is not trained."""
        shape = len(rows), self.seq_len
        ids_BT, mask_BT = np.full(shape, self.pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        unread_BT, documents_BT = np.ones(shape, dtype=np.bool_), np.zeros(shape, dtype=np.int64)
        mask = self.tokens.mask
        for b, row in enumerate(rows.tolist()):
            at = 0
            for number, i in enumerate(range(int(self.rows[row]), int(self.rows[row + 1]))):
                begin, length = int(self.begins[i]), int(self.lengths[i])
                ids_BT[b, at : at + length] = self.tokens.read(begin, begin + length)
                documents_BT[b, at : at + length] = number
                unread_BT[b, at : at + length] = mask is not None and mask.read(begin, begin + length) == 0
                # The first token of a later piece is trained in the piece before it.
                unread_BT[b, at] |= mask is not None or not self.cross_document_attention
                at += length
            mask_BT[b, :at] = 1
            documents_BT[b, at:] = number + 1
        ids, unread = torch.from_numpy(ids_BT), torch.from_numpy(unread_BT)
        made = {"input_ids": ids, "labels": ids.masked_fill(unread, -100), "attention_mask": torch.from_numpy(mask_BT)}
        return made if self.cross_document_attention else {**made, "document_ids": torch.from_numpy(documents_BT)}

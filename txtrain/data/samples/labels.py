"""Texts with labels: their split, their special tokens, and batches of them."""

# B batch, T positions, C classes or numbers

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from txtrain.data.samples.draws import Draws
from txtrain.data.samples.length_order import padded_length
from txtrain.data.samples.order import Indices
from txtrain.data.samples.row_corpus import RowCorpus
from txtrain.data.samples.rows import Rows, mask_of, padded
from txtrain.data.sources.labels import Labelled
from txtrain.data.sources.source import Split
from txtrain.data.store.tokens import Tokens
from txtrain.data.tokenizer.tokenizer import Frame, Tokenizer
from txtrain.errors import ConfigError

LABEL_FILES = {"train": "labels-train.npy", "validation": "labels-validation.npy"}


class LabelledSource(Protocol):
    def labelled(self, split: Split) -> Iterator[Labelled]: ...


class LabelledCorpus(RowCorpus[Labelled]):
    """Texts with labels."""

    source: LabelledSource
    kind = "labels"

    def read(self, split: Split) -> Iterator[Labelled]:
        return self.source.labelled(split)

    def texts(self, row: Labelled) -> Sequence[str]:
        return row.texts

    def content(self) -> Iterator[tuple[Split, str]]:
        return ((split, repr(row)) for split, row in self.rows())

    def write_labels(self, folder: Path) -> None:
        """The labels of both splits, beside their tokens."""
        found: dict[Split, list[object]] = {"train": [], "validation": []}
        for split, row in self.rows():
            found[split].append(row.label)
        for split, labels in found.items():
            np.save(folder / LABEL_FILES[split], np.array(labels), allow_pickle=False)


class LabelledSamples(Rows):
    """Row i is the i-th row of a split, within the tokenizer's special tokens. One that is longer than seq_len is cut:
    of a pair the end of the longer text, as `transformers` does with truncation=True.

    tokens: document k of a row, and of a pair documents 2 k and 2 k + 1, each followed by the end token.
    types: the model has segments, so many.
    """

    def __init__(
        self, tokens: Tokens, labels: NDArray[np.float64], frame: Frame, seq_len: int, pad_id: int, n_types: int
    ) -> None:
        self.tokens, self.labels, self.frame, self.seq_len = tokens, labels, frame, seq_len
        self.pad_id, self.n_types = pad_id, n_types
        n_texts = len(frame.specials) - 1
        whole = (np.diff(tokens.offsets) - 1).reshape(-1, n_texts).sum(axis=1) + frame.n_specials
        self.n_cut = int((whole > seq_len).sum())
        self.lengths: Indices = np.minimum(whole, seq_len)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Indices, draws: Draws | None = None) -> dict[str, Tensor]:
        """input_ids, attention_mask, token_type_ids (if the model has segments): int64 [B, T], right-padded to a
        multiple of 8. labels: int64 [B]; of several classes and of numbers float32 [B, C], of one number [B]."""
        n = len(self.frame.specials) - 1
        texts = [[self.tokens.document(n * row + k)[:-1].tolist() for k in range(n)] for row in rows.tolist()]
        made = framed(texts, self.frame, self.seq_len, self.pad_id, self.n_types)
        found = self.labels[rows]
        one_number = found.ndim == 2 and found.shape[1] == 1
        labels = torch.from_numpy(found[:, 0] if one_number else found)
        return {**made, "labels": labels.float() if found.ndim == 2 else labels.long()}


def frame_of(tokenizer: Tokenizer, n_texts: int, seq_len: int) -> Frame:
    """Of a `framed` tokenizer.

    Raises:
        ConfigError: seq_len has no room for a token beside the special ones.
    """
    frame = tokenizer.frame(n_texts)
    if frame.n_specials >= seq_len:
        least = frame.n_specials + 1
        told = f"{least}, a token beside {frame.n_specials} special ones, but is {seq_len} instead"
        raise ConfigError(f"`data.seq_len` must be at least {told}. Nearest: {least}.")
    return frame


def framed(
    rows: Sequence[Sequence[list[int]]], frame: Frame, seq_len: int, pad_id: int, n_types: int
) -> dict[str, Tensor]:
    """input_ids, attention_mask and token_type_ids of rows of one text or two, as of `LabelledSamples.batch`."""
    texts = []
    for row in rows:
        kept = fitted([len(text) for text in row], seq_len - frame.n_specials)
        texts.append(frame.around([text[:length] for text, length in zip(row, kept, strict=True)]))
    longest = padded_length(max(len(ids) for ids, _ in texts), seq_len)
    ids, types = zip(*texts, strict=True)
    made = {"input_ids": padded(ids, pad_id, longest), "attention_mask": mask_of(ids, longest)}
    if n_types:
        made["token_type_ids"] = padded(types, 0, longest).clamp(max=n_types - 1)
    return made


def fitted(lengths: list[int], room: int) -> list[int]:
    """How much is kept of one text or two: of a pair the longer one is cut, then both to halves (as `tokenizers`)."""
    if sum(lengths) <= room:
        return lengths
    if len(lengths) == 1:
        return [room]
    short, long = min(lengths), max(room - min(lengths), 0)
    if long < short:
        short, long = room // 2, room - room // 2
    return [long, short] if lengths[0] > lengths[1] else [short, long]

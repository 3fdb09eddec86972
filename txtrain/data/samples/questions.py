"""Questions as rows of tokens, one for each option."""

# B questions, C options, T tokens of the longest

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from txtrain.data.samples.draws import Draws
from txtrain.data.samples.length_order import padded_length
from txtrain.data.samples.order import Indices
from txtrain.data.samples.rows import Rows
from txtrain.data.sources.questions import Question
from txtrain.data.tokenizer.tokenizer import Tokenizer

Ids = list[int]


class Encoded(NamedTuple):
    """A question's options as tokens: what is read, and what is predicted after it. n_bytes, answer: as of Question."""

    options: tuple[tuple[Ids, Ids], ...]
    n_bytes: tuple[int, ...]
    answer: int | None


def encode(question: Question, tokenizer: Tokenizer, seq_len: int, two_stacks: bool) -> Encoded:
    """At most seq_len tokens for each option: the begin of what is read is left out, if it is too long.

    One stack reads and predicts a sequence; spaces between its parts belong to the second, as in training. Two stacks
    read the first, with its end token, and predict the second, with its own.
    """
    made = []
    for before, scored in question.options:
        if two_stacks:
            read = [*tokenizer.encode(before.strip())[: seq_len - 1], tokenizer.eos_id]
            target = [*tokenizer.encode(scored.strip())[: seq_len - 1], tokenizer.eos_id] if scored else []
            made.append((read, target))
            continue
        first, whole = halves(tokenizer, before, scored)
        start = tokenizer.eos_id if tokenizer.bos_id is None and not first else tokenizer.bos_id
        read = [*([] if start is None else [start]), *first]
        target = whole[len(first) :][: seq_len - 1]
        made.append((read[max(0, len(read) + len(target) - seq_len) :], target))
    return Encoded(tuple(made), question.n_bytes, question.answer)


def halves(tokenizer: Tokenizer, before: str, scored: str) -> tuple[Ids, Ids]:
    """Tokens of what is read, and of it with what is scored behind it. Spaces between them belong to what is scored, as
    in training: as tokens of their own at the end of what is read they would not be the begin of the whole."""
    first = tokenizer.encode(before.rstrip() if scored else before)
    return first, tokenizer.encode(before + scored) if scored else first


class QuestionRows(Rows):
    """Row i is the question of that number."""

    def __init__(
        self, items: Sequence[Encoded], numbers: Indices, tokenizer: Tokenizer, seq_len: int, two_stacks: bool
    ) -> None:
        self.items, self.numbers, self.seq_len, self.two_stacks = items, numbers, seq_len, two_stacks
        self.pad_id = tokenizer.padding_id

    def __len__(self) -> int:
        return len(self.numbers)

    def sources(self, rows: Indices) -> list[list[int]]:
        return [[number] for number in self.numbers[rows].tolist()]

    def batch(self, rows: Indices, draws: Draws | None = None) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels (-100: not predicted), int64 [B, C, T], padded on the right; n_bytes
        [B, C], 0 where a question has fewer options; answer [B], -1 where it is unknown."""
        items = [self.items[number] for number in self.numbers[rows].tolist()]
        B, C = len(items), max(len(item.options) for item in items)
        read = [[a if self.two_stacks else a + b for a, b in item.options] for item in items]
        target = [[b if self.two_stacks else [-100] * len(a) + b for a, b in item.options] for item in items]
        ids, labels = _padded(read, C, self.seq_len, self.pad_id), _padded(target, C, self.seq_len, -100)
        lengths = np.zeros((B, C, 1), dtype=np.int64)
        n_bytes = np.zeros((B, C), dtype=np.int64)
        for b, item in enumerate(items):
            n_bytes[b, : len(item.options)] = item.n_bytes
            lengths[b, : len(item.options), 0] = [len(row) for row in read[b]]
        mask = np.arange(ids.shape[-1]) < np.maximum(lengths, 1)  # a row without any token would be undefined
        made = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": labels, "n_bytes": n_bytes}
        answers = [-1 if item.answer is None else item.answer for item in items]
        return {name: torch.from_numpy(value) for name, value in made.items()} | {"answer": torch.tensor(answers)}


def _padded(rows: Sequence[Sequence[Ids]], C: int, seq_len: int, fill: int) -> Indices:
    """[B, C, T]"""
    longest = max(1, *(len(ids) for options in rows for ids in options))
    found = np.full((len(rows), C, padded_length(longest, seq_len)), fill, dtype=np.int64)
    for b, options in enumerate(rows):
        for c, ids in enumerate(options):
            found[b, c, : len(ids)] = ids
    return found

"""Samples of two segments: of one document cut in two, or of two documents.

    [CLS] first segment [SEP] second segment [SEP] padding
      0     0       0     0      1      1      1      0        token_type_ids
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from txtrain.data.samples.draws import Draws
from txtrain.data.samples.order import Indices
from txtrain.data.samples.rows import Rows
from txtrain.data.store.tokens import Tokens
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.errors import ConfigError

FOLLOWS, ELSEWHERE = 0, 1  # BERT's labels


class SentencePairs(Rows):
    """Row i is a chunk of seq_len - 3 tokens of one document, or the rest at its end if that has at least two tokens.

    Whenever a row is read, its `draws` cut the chunk at a random place. In half of the cases the part behind the cut
    stays; else as many tokens from a random place of another document replace it, so that length gives no hint.

    Raises:
        ConfigError: there are no two documents with at least two tokens.
    """

    def __init__(self, tokens: Tokens, tokenizer: Tokenizer, seq_len: int) -> None:
        self.tokens, self.seq_len, self.room = tokens, seq_len, seq_len - 3
        self.cls, self.sep = tokenizer.id_of("[CLS]"), tokenizer.id_of("[SEP]")
        skip = 0 if tokenizer.bos_id is None else 1  # in the cache a document is bos + text + eos
        begins, ends = np.asarray(tokens.offsets[:-1]) + skip, np.asarray(tokens.offsets[1:]) - 1
        long_enough = ends - begins >= 2
        self.begins, self.ends = begins[long_enough], ends[long_enough]
        if len(self.begins) < 2:
            n, part = len(self.begins), "training" if tokens.split == "train" else "validation"
            raise ConfigError(
                f"`objective.next_sentence` must be false with a {part} text of {n} document{'s' * (n != 1)}: "
                "a segment that does not follow is of another document. Give more files, or data whose files hold "
                "several documents."
            )
        lengths = self.ends - self.begins
        n_chunks = lengths // self.room + (lengths % self.room >= 2)
        self.first_row = np.concatenate(([0], np.cumsum(n_chunks)))

    def __len__(self) -> int:
        return int(self.first_row[-1])

    def sources(self, rows: Indices) -> list[list[int]]:
        begins = self.begins[np.searchsorted(self.first_row, rows, side="right") - 1]
        return [self.tokens.numbers(begin, begin + 1) for begin in begins.tolist()]

    def batch(self, rows: Indices, draws: Draws) -> dict[str, Tensor]:
        """int64: input_ids, token_type_ids, attention_mask, labels (the input_ids) [B, T]; next_sentence_label [B]."""
        document = np.searchsorted(self.first_row, rows, side="right") - 1
        begin = self.begins[document] + (rows - self.first_row[document]) * self.room
        length = np.minimum(self.ends[document] - begin, self.room)
        cut = 1 + draws.integer("cut", length - 1)
        label = (draws.uniform("next sentence", 1)[:, 0] < 0.5).astype(np.int64)
        other = draws.integer("other document", len(self.begins) - 1)
        other += other >= document  # any but the chunk's own
        wanted = np.minimum(length - cut, self.ends[other] - self.begins[other])
        start = self.begins[other] + draws.integer("other place", self.ends[other] - self.begins[other] - wanted + 1)
        second = np.where(label == FOLLOWS, begin + cut, start)
        second_length = np.where(label == FOLLOWS, length - cut, wanted)
        made = self._written(begin, cut, second, second_length)
        return {**made, "labels": made["input_ids"].clone(), "next_sentence_label": torch.from_numpy(label)}

    def _written(self, begin: Indices, length: Indices, second: Indices, second_length: Indices) -> dict[str, Tensor]:
        shape = len(begin), self.seq_len
        ids = np.full(shape, self.sep, dtype=np.int64)
        types, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for i in range(shape[0]):
            middle, end = length[i] + 2, length[i] + second_length[i] + 3
            ids[i, 0] = self.cls
            ids[i, 1 : middle - 1] = self.tokens.read(begin[i], begin[i] + length[i])
            ids[i, middle : end - 1] = self.tokens.read(second[i], second[i] + second_length[i])
            types[i, middle:end] = 1
            mask[i, :end] = 1
        return {
            name: torch.from_numpy(array)
            for name, array in (("input_ids", ids), ("token_type_ids", types), ("attention_mask", mask))
        }

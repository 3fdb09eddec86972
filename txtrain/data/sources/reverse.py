"""data=reverse: random strings, and their reverse. No files; an encoder-decoder learns it in minutes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from txtrain.data.samples.draws import Draws
from txtrain.data.sources.source import Split
from txtrain.errors import ConfigError

_ALPHABETS = {"digits": "0123456789", "letters": "abcdefghijklmnopqrstuvwxyz"}


class Reverse:
    """Pair i is a function of i. Equal strings are on one side of the split (`PairCorpus`).

    Raises:
        ConfigError: the lengths are no range.
    """

    def __init__(self, n_pairs: int, min_length: int, max_length: int, symbols: str) -> None:
        if not 1 <= min_length <= max_length:
            raise ConfigError(
                f"`data.min_length` must be from 1 to data.max_length ({max_length}), but is {min_length} instead."
            )
        self.n_pairs, self.min_length, self.max_length, self.symbols = n_pairs, min_length, max_length, symbols

    def pairs(self, split: Split) -> Iterator[tuple[str, str]]:
        alphabet = np.array(list(_ALPHABETS[self.symbols]))
        draws = Draws(0, "train", np.arange(self.n_pairs))  # the same task for every seed of the run
        lengths = self.min_length + draws.integer("length", self.max_length - self.min_length + 1)
        drawn = (draws.uniform("symbols", self.max_length) * len(alphabet)).astype(np.int64)
        for row, length in zip(alphabet[drawn], lengths, strict=True):
            text = "".join(row[:length])
            yield text, text[::-1]

    def identity(self) -> str:
        return f"reverse 1 {self.n_pairs} {self.min_length} {self.max_length} {self.symbols}"

    def describe(self) -> str:
        return f"{self.n_pairs:,} strings of {self.min_length} to {self.max_length} {self.symbols}, to be reversed"

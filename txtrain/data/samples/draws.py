"""Random numbers without a generator: functions of (seed, split, global sample index) and of the name of the draw.

So masks, spans and crops are the same after a resume, for any number of ranks, workers or micro-batches, and in every
validation.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from txtrain.data.samples.order import Indices, mix
from txtrain.data.sources.source import Split

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draws:
    """Random numbers for the samples of one batch.

    Args:
        index: global sample indices [B]; in validation, rows of the validation set.
    """

    def __init__(self, seed: int, split: Split, index: Indices) -> None:
        self.seed, self.split, self.index = seed, split, index

    def uniform(self, name: str, n: int) -> NDArray[np.float64]:
        """[B, n], in [0, 1). The same name gives the same numbers: use a name of its own for each draw."""
        digest = hashlib.blake2b(f"{self.seed}/{self.split}/{name}".encode(), digest_size=8).digest()
        key = np.frombuffer(digest, "<u8")
        start_B1 = mix(mix(self.index.astype(np.uint64)) ^ key)[:, None]
        words = mix(start_B1 + np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN)  # splitmix64's sequence from that start
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integer(self, name: str, below: Indices | int) -> Indices:
        """[B]: one integer per sample, in [0, below)."""
        drawn: Indices = (self.uniform(name, 1)[:, 0] * below).astype(np.int64)
        return drawn

"""The order of samples as arithmetic: what step s trains on is a pure function of (seed, s).

Step s (0-based) holds the global sample indices g = s*G .. s*G + G - 1. Index g is row permutation(seed, epoch)[g % n]
of epoch g // n. Nothing is stored or shuffled: a run resumes at any step, on any number of ranks, with the same
samples. The permutation is a keyed bijection, which needs no memory for any number of samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
_Words = NDArray[np.uint64]

_ROUNDS = 6
_CHUNK = 1 << 16  # indices hashed at a time


def mix(x: _Words) -> _Words:
    """splitmix64's finaliser (Steele et al. 2014): each bit of the input changes half of the output's bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(positions: Indices, n: int, seed: int, epoch: Indices | int = 0) -> Indices:
    """The rows at `positions` (each in 0..n-1) of the shuffled range(n), for the `epoch` of each position.

    An unbalanced Feistel network over the smallest power of two that holds n; results outside are passed through again
    until they are inside (cycle walking, Black and Rogaway 2002), less than once per position on average.
    """
    bits = (n - 1).bit_length()
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    key = mix(
        mix(np.asarray(seed & 0xFFFFFFFFFFFFFFFF, np.uint64)[None]) ^ np.asarray(epoch, np.int64).astype(np.uint64)
    )
    keys = np.broadcast_to(key, positions.shape)

    def scramble(x: _Words, key: _Words) -> _Words:
        high, low = x >> low_bits, x & low_mask
        for i in range(_ROUNDS):
            key = key + np.uint64(0x9E3779B97F4A7C15)
            if i % 2:
                low = low ^ (mix(high ^ key) & low_mask)
            else:
                high = high ^ (mix(low ^ key) & high_mask)
        return high << low_bits | low

    rows = scramble(positions.astype(np.uint64), keys)
    while (outside := np.flatnonzero(rows >= n)).size:
        rows[outside] = scramble(rows[outside], keys[outside])
    return rows.astype(np.int64)


@dataclass(frozen=True)
class GlobalOrder:
    """The samples of each step. overfit_batches: if > 0, repeat the samples of the first so many steps."""

    n: int  # samples in the training set
    global_batch_size: int
    seed: int
    overfit_batches: int = 0

    @property
    def salt(self) -> bytes:
        """What the rows stand for beyond their numbers; part of the hash."""
        return b""

    def indices(self, step: int, n_steps: int = 1) -> Indices:
        """Global sample indices of the steps from `step` on: int64 [n_steps * global_batch_size]."""
        size = self.global_batch_size
        if not self.overfit_batches:
            return np.arange(step * size, (step + n_steps) * size, dtype=np.int64)
        steps = np.arange(step, step + n_steps, dtype=np.int64) % self.overfit_batches
        return (steps[:, None] * size + np.arange(size)).ravel()

    def rows(self, indices: Indices) -> Indices:
        """Rows of the training set for global sample indices."""
        return permutation(indices % self.n, self.n, self.seed, indices // self.n)


@dataclass(frozen=True)
class RolloutOrder(GlobalOrder):
    """The prompts of a rollout, global_batch_size of them, at each of the `updates` steps that it serves."""

    updates: int = 1

    def indices(self, step: int, n_steps: int = 1) -> Indices:
        size = self.global_batch_size
        rollouts = np.arange(step, step + n_steps, dtype=np.int64) // self.updates
        if self.overfit_batches:
            rollouts %= self.overfit_batches
        return (rollouts[:, None] * size + np.arange(size)).ravel()


class ShareSampler:
    """A list of global sample indices per step, without end: this rank's contiguous share, from `start_step` on."""

    def __init__(self, order: GlobalOrder, rank: int = 0, world_size: int = 1, start_step: int = 0) -> None:
        share = order.global_batch_size // world_size
        self.order, self.start_step = order, start_step
        self.share = slice(rank * share, (rank + 1) * share)

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            yield self.order.indices(step)[self.share].tolist()
            step += 1


class OrderHash:
    """A hash of the rows of steps 1..step in order. Cheap for increasing steps: it continues from the last one."""

    def __init__(self, order: GlobalOrder) -> None:
        self.order = order
        self._step, self._hash = 0, hashlib.sha256(order.salt)

    def __call__(self, step: int) -> str:
        if step < self._step:
            self._step, self._hash = 0, hashlib.sha256(self.order.salt)
        stride = max(1, _CHUNK // self.order.global_batch_size)
        for first in range(self._step, step, stride):
            rows = self.order.rows(self.order.indices(first, min(stride, step - first)))
            self._hash.update(rows.astype("<i8").tobytes())
        self._step = step
        return self._hash.hexdigest()[:16]

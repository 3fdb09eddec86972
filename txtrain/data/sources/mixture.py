"""data=mixture: several sources in one run, each with its share of the samples.

Global sample indices come in blocks of a fixed length. The source of an index, and the sample, are arithmetic:

- of the n samples up to the end of block b, source k has floor(W_k n) - floor(W_(k-1) n), where W_k is the sum of the
  shares up to k: less than one sample from its share of n, and n in all;
- within a block the sources are shuffled by permutation(seed, b).

So the proportions are exact at the end of each block, nothing is stored, and a run resumes at any step.
"""

# B batch, K sources

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from txtrain.data.samples.draws import Draws
from txtrain.data.samples.order import GlobalOrder, Indices, permutation
from txtrain.data.samples.rows import Rows

_BLOCK = 256  # samples, at least
_GOLDEN = 0x9E3779B97F4A7C15


class Mixture:
    """What `data=mixture` names; `data/prepare.py` makes the samples."""

    def __init__(self, sources: Mapping[str, Any], weights: Mapping[str, float] | None) -> None:
        self.sources, self.weights = dict(sources), weights

    def parts(self) -> Mapping[str, Any]:
        """The config of each source."""
        return self.sources

    def shares(self, sizes: Sequence[int]) -> list[Fraction]:
        """The share of each source, with sum 1; without weights in proportion to the sizes."""
        given = sizes if self.weights is None else [Fraction(repr(self.weights[name])) for name in self.sources]
        return [Fraction(w) / sum(map(Fraction, given)) for w in given]

    def describe(self) -> str:
        weights = {} if self.weights is None else self.weights
        return "mixture of " + ", ".join(
            name + (f" ({weights[name]:g})" if name in weights else "") for name in self.sources
        )


@dc.dataclass(frozen=True, eq=False)
class MixtureOrder(GlobalOrder):
    """n: rows of all sources, concatenated in order."""

    sizes: tuple[int, ...] = dc.field(kw_only=True)  # rows of each source
    shares: tuple[Fraction, ...] = dc.field(kw_only=True)

    @cached_property
    def block(self) -> int:
        """Block length: enough for a sample of each source, so that no count in the formula above decreases."""
        return max(_BLOCK, 1 << (-(-1 // min(self.shares)) - 1).bit_length())

    def before(self, n: int) -> Indices:
        """[K]: samples of each source among the first n indices; n must be the end of a block."""
        sums = [sum(self.shares[: k + 1], Fraction(0)) for k in range(len(self.shares))]
        return np.diff([int(s * n) for s in sums], prepend=0)

    def place(self, indices: Indices) -> tuple[Indices, Indices]:
        """The source of each index, and its number among the samples of this source in the run."""
        source, which = np.empty_like(indices), np.empty_like(indices)
        for b in np.unique(indices // self.block).tolist():
            here = indices // self.block == b
            begin = self.before(b * self.block)
            ends = np.cumsum(self.before((b + 1) * self.block) - begin)
            slot = permutation(indices[here] % self.block, self.block, self.seed, b)
            k = np.searchsorted(ends, slot, side="right")
            source[here] = k
            which[here] = begin[k] + slot - np.concatenate(([0], ends))[k]
        return source, which

    def counts(self, step: int) -> Indices:
        """[K]: samples of each source in steps 1..step."""
        if self.overfit_batches:
            rounds, step = divmod(step, self.overfit_batches)
            return (
                rounds * self._first(self.overfit_batches * self.global_batch_size)
                + self._first(step * self.global_batch_size)
            )
        return self._first(step * self.global_batch_size)

    def _first(self, n: int) -> Indices:
        whole = n // self.block * self.block
        rest, _ = self.place(np.arange(whole, n, dtype=np.int64))
        return self.before(whole) + np.bincount(rest, minlength=len(self.sizes))

    def rows(self, indices: Indices) -> Indices:
        source, which = self.place(indices)
        first = np.cumsum([0, *self.sizes])
        rows = np.empty_like(indices)
        for k, n in enumerate(self.sizes):
            here = source == k
            rows[here] = first[k] + permutation(which[here] % n, n, self.seed + (k + 1) * _GOLDEN, which[here] // n)
        return rows


class MixedRows(Rows):
    """The concatenated rows of several sets, all of one shape."""

    def __init__(self, sets: Sequence[Rows]) -> None:
        self.sets = tuple(sets)
        self.first = np.cumsum([0, *map(len, self.sets)])

    def __len__(self) -> int:
        return int(self.first[-1])

    def sources(self, rows: Indices) -> list[list[int]]:
        of = (np.searchsorted(self.first, rows, side="right") - 1).tolist()
        return [self.sets[k].sources(np.array([row - self.first[k]]))[0] for k, row in zip(of, rows, strict=True)]

    def batch(self, rows: Indices, draws: Draws) -> dict[str, Tensor]:
        """The batch in the order of `rows`, with the same draws for each sample as in its own set."""
        of_B = np.searchsorted(self.first, rows, side="right") - 1
        made: dict[str, Tensor] = {}
        for k in np.unique(of_B).tolist():
            here = np.flatnonzero(of_B == k)
            part = self.sets[k].batch(rows[here] - self.first[k], Draws(draws.seed, draws.split, draws.index[here]))
            for name, value in part.items():
                whole = made.setdefault(name, value.new_empty((len(rows), *value.shape[1:])))
                whole[torch.from_numpy(here)] = value
        return made

"""Batches of samples of similar length, for less padding, in an order that is still a function of (seed, step)."""

from __future__ import annotations

import dataclasses as dc

import numpy as np

from txtrain.data.samples.order import GlobalOrder, Indices, mix, permutation

BUCKET = 8  # tokens; lengths are rounded up to a multiple, and batches padded to one


def padded_length(longest: int, seq_len: int) -> int:
    """The length to which a batch is padded: no more than the model may have positions for."""
    return min(-(-longest // BUCKET) * BUCKET, seq_len)


@dc.dataclass(frozen=True, eq=False)
class LengthOrder(GlobalOrder):
    """In epoch e samples are sorted by length, rounded up to a multiple of BUCKET, then by a hash of (seed, e, row).

    Each global_batch_size consecutive samples form a global batch, and permutation(seed, e) orders the batches: they
    differ between epochs. The n % global_batch_size samples with the smallest hashes are not in the epoch.
    """

    lengths: Indices = dc.field(kw_only=True)
    _epochs: dict[int, Indices] = dc.field(default_factory=dict, init=False, repr=False)  # the latest two, sorted

    def rows(self, indices: Indices) -> Indices:
        size = self.global_batch_size
        n_batches = self.n // size
        epoch, at = np.divmod(indices, n_batches * size)
        place = permutation(at // size, n_batches, self.seed, epoch) * size + at % size
        rows = np.empty_like(indices)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            rows[here] = self._sorted(e)[place[here]]
        return rows

    def _sorted(self, epoch: int) -> Indices:
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            key = mix(mix(np.array([self.seed & 0xFFFFFFFFFFFFFFFF], np.uint64)) ^ np.uint64(epoch))
            draw = mix(np.arange(self.n, dtype=np.uint64) ^ key)
            kept = np.sort(np.argsort(draw, kind="stable")[self.n % self.global_batch_size :])
            self._epochs[epoch] = kept[np.lexsort((draw[kept], -(-self.lengths[kept] // BUCKET)))]
        return self._epochs[epoch]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": {}}  # workers sort themselves

"""Loss spikes and divergence, as an exact function of the losses of a run's steps."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Iterable

from txtrain.checkpoint.state import LossState

WINDOW = 64  # steps that a loss is compared with
ENOUGH = 32  # losses in the window before any is judged
DEVIATIONS = 8.0  # above the median, in standard deviations of the noise
LEAST = 0.1  # and at least this part of the median
LOST = 0.25  # of the fall of the loss since the beginning
FACTOR = 1.5  # times the lowest median


@dc.dataclass(frozen=True)
class Spike:
    """A step's loss and the median of the steps before it. first: the previous step was no spike."""

    step: int
    loss: float
    median: float
    first: bool


class Losses:
    """Watches the loss of every step. `state` goes into the checkpoint: a resumed run decides as an uninterrupted one.

    A spike is above the median of the last 64 losses by 8 standard deviations of their noise and by a tenth of that
    median. The noise is estimated robustly and without the trend: from the median of the differences between steps.
    A spike that lasts soon becomes the median, and is then no spike any more.

    A step is far off where its loss is above 1.5 times the lowest median of the run, and a quarter of the progress is
    lost: of the way from the highest of the first 32 losses down to that median. A run has diverged when many steps in
    a row are far off (`far_off`).
    """

    def __init__(self, state: LossState | None = None) -> None:
        state = state or LossState()
        self.window = list(state.window)
        self.first, self.lowest = state.first, state.lowest
        self.n_spikes, self.far_off, self._in_spike = state.n_spikes, state.far_off, state.in_spike

    def state(self) -> LossState:
        return LossState(
            window=list(self.window),
            first=self.first,
            lowest=self.lowest,
            n_spikes=self.n_spikes,
            far_off=self.far_off,
            in_spike=self._in_spike,
        )

    def add(self, step: int, loss: float) -> Spike | None:
        """Add a step's loss; returns a spike, if it is one. Non-finite losses are ignored: their steps are skipped."""
        if not math.isfinite(loss):
            return None
        found = None
        if len(self.window) >= ENOUGH:
            median = _median(self.window)
            found = self._spike(step, loss, median)
            self._compare(loss, median)
        self._in_spike = found is not None
        self.window = [*self.window[-WINDOW + 1 :], loss]
        return found

    def _spike(self, step: int, loss: float, median: float) -> Spike | None:
        deviation = (
            1.4826 / math.sqrt(2) * _median(abs(b - a) for a, b in zip(self.window, self.window[1:], strict=False))
        )
        if loss - median <= max(DEVIATIONS * deviation, LEAST * abs(median)):
            return None
        self.n_spikes += 1
        return Spike(step, loss, median, first=not self._in_spike)

    def _compare(self, loss: float, median: float) -> None:
        self.first = max(self.window) if self.first is None else self.first
        self.lowest = median if self.lowest is None else min(self.lowest, median)
        border = max(FACTOR * self.lowest, self.lowest + LOST * (self.first - self.lowest))
        self.far_off = self.far_off + 1 if self.lowest > 0 and loss > border else 0


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]

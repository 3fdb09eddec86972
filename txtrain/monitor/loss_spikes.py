"""Steps whose loss stands out, and runs that have lost what they had learnt. Exact: a function of the losses of the run's steps."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Iterable

from txtrain.checkpoint.state import LossState

WINDOW = 64  # steps that a loss is compared with
ENOUGH = 32  # of them before anything is said
DEVIATIONS = 8.0  # above the median, in standard deviations of the noise
LEAST = 0.1  # and at least this part of the median
LOST = 0.25  # of what has been learnt since the beginning
FACTOR = 1.5  # times the lowest median


@dc.dataclass(frozen=True)
class Spike:
    """A step's loss beside the median of the steps before it. first: the step before was none."""

    step: int
    loss: float
    median: float
    first: bool


class Losses:
    """Watches the loss of every step. `state` goes into the checkpoint, so that a resumed run sees what the uninterrupted one does.

    A spike is above the median of the last 64 losses by 8 standard deviations of what is noise in them (robustly, and whatever way the loss
    goes meanwhile: by the median of the differences from step to step) and by a tenth of the median.
    A spike that stays is soon the median itself, and then no spike any more.

    A step is far off where its loss is above 1.5 times the lowest median of the run, and a quarter of what was learnt is lost: of the
    way from the highest loss of the first 32 steps down to that median. The run has diverged when that has been so for many steps in a row (`far_off`).
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
        """The step's loss; a spike, if it is one. One that is not finite is none of ours: the step is skipped, and told of elsewhere."""
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
        deviation = 1.4826 / math.sqrt(2) * _median(abs(b - a) for a, b in zip(self.window, self.window[1:], strict=False))
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

"""When a run must stop to save before the known end of its job."""

from __future__ import annotations

import time
from collections.abc import Callable

SPARE = 10.0  # seconds: for what is neither a step nor a save, and for a difference from SLURM's clock


class Deadline:
    """Decides when the last save must begin to be complete before the job's end.

    Between two calls of `near` lies a step, a validation batch or a token of a sample: at most the longest seen so far.

    Args:
        end: in seconds since 1970; None: unknown.
    """

    def __init__(self, end: float | None, clock: Callable[[], float] = time.time) -> None:
        self.longest = 0.0
        self._clock, self._begun = clock, clock()
        self.end = None if end is None or end <= self._begun else end  # SLURM may let a job run on
        self._last: float | None = None  # None: the first step, which compiles, is not timed

    def near(self, save: float) -> bool:
        """Whether the run must stop here. save: seconds that a save takes; twice that is reserved for a slow disk.

        A job shorter than this margin still trains for half of its time.
        """
        now = self._clock()
        if self._last is not None:
            self.longest = max(self.longest, now - self._last)
        self._last = now
        if self.end is None:
            return False
        margin = min(self.longest + 2 * save + SPARE, (self.end - self._begun) / 2)
        return now + margin >= self.end

    def pause(self) -> None:
        """What follows is not a step and is not timed."""
        self._last = None

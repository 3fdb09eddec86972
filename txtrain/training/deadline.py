"""The end of the job that a run knows of beforehand."""

from __future__ import annotations

import time
from collections.abc import Callable

SPARE = 10.0  # seconds: for what is neither a step nor a save, and for a clock that is not SLURM's


class Deadline:
    """Says when a save must begin, so that it is done before the job's end.

    Between two looks lies a step, a batch of the validation or a token of a sample; the longest seen is what the next may take.

    Args:
        end: in seconds since 1970; None: it is not known.
    """

    def __init__(self, end: float | None, clock: Callable[[], float] = time.time) -> None:
        self.longest = 0.0
        self._clock, self._begun = clock, clock()
        self.end = None if end is None or end <= self._begun else end  # SLURM may let a job run on
        self._last: float | None = None  # so that the first step, which compiles, does not count

    def near(self, save: float) -> bool:
        """Whether the run must stop here. save: seconds that one may take; twice that is kept, for the system may be slow just then.

        A job that is shorter than all this still gets half of its time for training.
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
        """What comes now is no step."""
        self._last = None

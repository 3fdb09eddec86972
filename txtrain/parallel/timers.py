"""Where the time of a run goes: of each phase the seconds in it, without those of a phase within it. Torch comes with first use."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

PHASES = ("data", "forward_backward", "optimizer", "communication", "validation", "saving", "other")  # into which the time is split
_UNDIVIDED = ("validation", "saving")  # what they compute and exchange is theirs
_KEPT = 1024  # borders, before they are added up


class Clock(Protocol):
    """mark(): now. seconds(a, b): from one mark to a later one; what they stand for is over when it is called."""

    def mark(self) -> Any: ...

    def seconds(self, a: Any, b: Any) -> float: ...


class HostClock:
    """On a processor what a call takes is what it costs."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, a: float, b: float) -> float:
        return b - a


class DeviceClock:
    """Events in the stream that computes: a phase lasts from when the device reaches its begin to when it reaches its end, idle or not.

    The device is waited for when marks are added up, which happens where a row is written, after its loss has been waited for anyway.
    """

    def mark(self) -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, a: Any, b: Any) -> float:
        b.synchronize()
        return float(a.elapsed_time(b)) / 1000


class Phases:
    """One phase at a time, in the thread that trains. Without `start` it notes nothing.

    labelled: while a profiler runs, phases stand in its trace.
    """

    def __init__(self) -> None:
        self.labelled = False
        self._clock: Clock | None = None
        self._borders: list[tuple[str, Any]] = []  # a phase, and where it begins
        self._sums = dict.fromkeys(PHASES, 0.0)
        self._thread = 0

    def start(self, device: torch.device, clock: Clock | None = None) -> None:
        self._thread = threading.get_ident()
        self._clock = clock or (DeviceClock() if device.type == "cuda" else HostClock())
        self._borders = [("other", self._clock.mark())]

    def stop(self) -> None:
        self._clock, self._borders = None, []

    def enter(self, name: str) -> None:
        """From here on it is this phase, until another is entered."""
        if self._clock is None or threading.get_ident() != self._thread:
            return
        if len(self._borders) >= _KEPT:
            self._add_up()
        self._borders.append((name, self._clock.mark()))

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """This phase, and then again what it was before."""
        if self._clock is None or threading.get_ident() != self._thread or (before := self._borders[-1][0]) in _UNDIVIDED:
            yield
            return
        self.enter(name)
        try:
            with self._label(name):
                yield
        finally:
            self.enter(before)

    def _label(self, name: str) -> contextlib.AbstractContextManager[Any]:
        if not self.labelled:
            return contextlib.nullcontext()
        from torch.profiler import record_function

        return record_function(name)

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call; they add up to the time that has passed."""
        if self._clock is not None:
            self.enter(self._borders[-1][0])
            self._add_up()
        taken, self._sums = self._sums, dict.fromkeys(PHASES, 0.0)
        return taken

    def _add_up(self) -> None:
        assert self._clock is not None
        for (name, begin), (_, end) in zip(self._borders, self._borders[1:], strict=False):
            self._sums[name] += self._clock.seconds(begin, end)
        self._borders = self._borders[-1:]

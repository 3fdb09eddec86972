"""Seconds that a run spends in each phase, without those of phases nested in it. Imports torch only in use."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

PHASES = ("data", "forward_backward", "optimizer", "communication", "validation", "saving", "other")
_UNDIVIDED = ("validation", "saving")  # phases that include what is nested in them
_KEPT = 1024  # borders held before they are summed


class Clock(Protocol):
    """mark(): now. seconds(a, b): from one mark to a later one, which may be waited for."""

    def mark(self) -> Any: ...

    def seconds(self, a: Any, b: Any) -> float: ...


class HostClock:
    """Wall-clock time of the host, for CPU runs."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, a: float, b: float) -> float:
        return b - a


class DeviceClock:
    """CUDA events in the compute stream: a phase lasts until the device reaches its end, idle time included.

    Synchronises only when marks are summed: where a row is logged, whose loss has been waited for already.
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
    """Times one phase at a time, in the thread that called `start`; without `start`, nothing.

    Beside PHASES those that an objective has of its own.

    labelled: set while a profiler runs, so that phases appear in its trace.
    """

    def __init__(self) -> None:
        self.labelled = False
        self._clock: Clock | None = None
        self._borders: list[tuple[str, Any]] = []  # a phase and the mark of its start
        self._sums = dict.fromkeys(PHASES, 0.0)
        self._thread = 0

    def start(self, device: torch.device, clock: Clock | None = None) -> None:
        self._thread = threading.get_ident()
        self._clock = clock or (DeviceClock() if device.type == "cuda" else HostClock())
        self._borders = [("other", self._clock.mark())]

    def stop(self) -> None:
        self._clock, self._borders = None, []

    def enter(self, name: str) -> None:
        """Start a phase, which lasts until another is entered."""
        if self._clock is None or threading.get_ident() != self._thread:
            return
        if len(self._borders) >= _KEPT:
            self._add_up()
        self._borders.append((name, self._clock.mark()))

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Time a phase, then return to the one before."""
        if (
            self._clock is None or threading.get_ident() != self._thread
            or (before := self._borders[-1][0]) in _UNDIVIDED
        ):
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
        """Seconds of each phase since the last call; their sum is the time elapsed."""
        if self._clock is not None:
            self.enter(self._borders[-1][0])
            self._add_up()
        taken, self._sums = self._sums, dict.fromkeys(self._sums, 0.0)
        return taken

    def _add_up(self) -> None:
        assert self._clock is not None
        for (name, begin), (_, end) in zip(self._borders, self._borders[1:], strict=False):
            self._sums[name] = self._sums.get(name, 0.0) + self._clock.seconds(begin, end)
        self._borders = self._borders[-1:]

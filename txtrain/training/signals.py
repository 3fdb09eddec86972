"""Signals end a run after the current step, with a checkpoint; before the first step at once. No torch."""

from __future__ import annotations

import contextlib
import enum
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from txtrain.errors import ConfigError
from txtrain.parallel.early_signals import PREEMPTED, PREEMPTING, SIGNALS, heard, hung_up, say

PATIENCE = 5.0  # seconds in which a start may still reach the end of its first step


class Preempted(Exception):
    """The run was asked to stop and its checkpoint is complete."""


class Cause(enum.IntEnum):
    """Why a run stops.

    PERSON: SIGINT; the exit code is not 75 where nothing was saved. CLUSTER: other signals, or the job's end is near.
    """

    NONE = 0
    CLUSTER = 1
    PERSON = 2


class Stop:
    """A flag that signals set. `with Stop() as stop:` installs the handlers and restores the former ones.

    A handler that saved would do so in the middle of a step, so the loop polls `agree` between steps. Before the first
    call nothing can be lost: a longer start (tokenising, compiling, waiting for other ranks) is ended after PATIENCE
    seconds by a thread, since the main thread may be blocked where Python handles no signal.

    Args:
        first: this rank prints for all.
        several: there are other ranks: when one leaves, the others fail in their next exchange with it.
        last_words: called when the process leaves before the first step; returns the exit code.
    """

    def __init__(
        self, first: bool = True, several: bool = False, last_words: Callable[[Cause], int] = lambda cause: PREEMPTED
    ) -> None:
        self.first, self.several, self.last_words = first, several, last_words
        self.asked = Cause.NONE  # of this rank
        self.deaf = False  # ignore further signals: SLURM is ending the job at our request
        self._begun = False
        self._lock = threading.Lock()
        self._before: dict[signal.Signals, Any] = {}
        self._watch: threading.Thread | None = None
        self._pipe = (-1, -1)
        self._wakeup = -1

    # --------------------------------------------------------------------------------------------------------- the flag

    def hold(self, numbers: tuple[signal.Signals, ...] = SIGNALS) -> None:
        """Handle the signals from here on. Called again after Lightning has set handlers of its own."""
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            for number in heard(numbers):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        hung_up(number)
        if not self.asked and self.first:
            say(f"{signal.Signals(number).name}: stopping after this step; a checkpoint follows.")
        self.asked = max(self.asked, Cause.PERSON if number == signal.SIGINT else Cause.CLUSTER)

    def end_is_near(self, when: float) -> None:
        """The job ends soon. when: in seconds since 1970."""
        if not self.asked:
            clock = time.strftime("%H:%M:%S", time.localtime(when))
            say(f"the job ends at {clock}: stopping after this step; a checkpoint follows.")
        self.asked = max(self.asked, Cause.CLUSTER)

    def agree(self, most: Callable[[int], int]) -> bool:
        """Whether the run must stop here. most: the maximum over all ranks. Collective."""
        agreed = most(int(self.asked))
        with self._lock:
            self._begun = True
        return bool(agreed)

    # -------------------------------------------------------------------------------------------------------- the owner

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._watch = threading.Thread(target=self._leave_a_long_start, name="signals", daemon=True)
            self._watch.start()
            self.hold(PREEMPTING)  # until training begins Ctrl-C raises KeyboardInterrupt
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, (Preempted, ConfigError)):
            self._is_it_a_consequence()
        if self._watch is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.deaf and number in PREEMPTING else handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._pipe[1], b"\0")
        self._watch.join()
        for end in self._pipe:
            os.close(end)

    def _is_it_a_consequence(self) -> None:
        """If the start failed because this or another rank was told to stop: leave as stopped, without a traceback."""
        deadline = time.monotonic() + PATIENCE
        while self.several and not self._begun and not self.asked and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.asked and not self._begun:
            self._leave()

    # -------------------------------------------------------------------------------------------- before the first step

    def _leave_a_long_start(self) -> None:
        """The thread: reads signal numbers from a pipe, whatever the main thread does."""
        deadline, cause = None, Cause.NONE
        while True:
            seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
            if select.select([self._pipe[0]], [], [], seconds)[0]:
                numbers = os.read(self._pipe[0], 64)
                if 0 in numbers:
                    return
                if deadline is None and any(number in numbers for number in SIGNALS):
                    deadline = time.monotonic() + PATIENCE
                    cause = Cause.PERSON if signal.SIGINT in numbers else Cause.CLUSTER
            elif deadline is not None:
                self.asked = max(self.asked, cause)  # the main thread may not have handled it
                self._leave()
                deadline = None

    def _leave(self) -> None:
        """End the process as a kill would, unless the first step is done after all."""
        with self._lock:
            if self._begun:
                return
            code = PREEMPTED
            try:
                code = self.last_words(self.asked)
            finally:
                os._exit(1 if self.asked == Cause.PERSON else code)


def ignore(*_: object) -> None:
    """For helper processes (a loader's workers): SLURM may signal all of a job's, and the run still needs them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _forget() -> None:
    """In a forked child: what is sent to it is not meant for the run."""
    held = [number for number in SIGNALS if isinstance(getattr(signal.getsignal(number), "__self__", None), Stop)]
    if held:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
            for number in held:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)

"""Signals end a run at the next step, with a complete checkpoint; before the first step they end it as it is. No torch."""

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
    """Why a run stops. PERSON: SIGINT, which has no exit code 75 where there is nothing to save. CLUSTER: its signals, or the end of the job is near."""

    NONE = 0
    CLUSTER = 1
    PERSON = 2


class Stop:
    """A flag that the signals set; `with Stop() as stop:` owns them, and gives them back.

    A handler that saved by itself would do so in the middle of a step. So whoever is between two steps asks `agree`, and until it was
    asked for the first time nothing has been done that could be lost: a start that takes longer (tokenising, compiling, waiting for
    other processes) is left after PATIENCE seconds, by a thread, since the main one may be waiting where Python answers no signal.

    Args:
        first: this process speaks for all.
        several: the run has other processes: when one leaves, the others fail at what they do with it.
        last_words: when it leaves so; the exit code.
    """

    def __init__(self, first: bool = True, several: bool = False, last_words: Callable[[Cause], int] = lambda cause: PREEMPTED) -> None:
        self.first, self.several, self.last_words = first, several, last_words
        self.asked = Cause.NONE  # of this process
        self.deaf = False  # whatever still comes, nobody answers: SLURM is ending the job at our own wish
        self._begun = False
        self._lock = threading.Lock()
        self._before: dict[signal.Signals, Any] = {}
        self._watch: threading.Thread | None = None
        self._pipe = (-1, -1)
        self._wakeup = -1

    # ------------------------------------------------------------------------------------------------------------ the flag

    def hold(self, numbers: tuple[signal.Signals, ...] = SIGNALS) -> None:
        """Answer the signals from here on. Lightning sets handlers of its own when training starts."""
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            for number in heard(numbers):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        hung_up(number)
        if not self.asked and self.first:
            say(f"{signal.Signals(number).name}: stopping after this step; a checkpoint follows.")
        self.asked = max(self.asked, Cause.PERSON if number == signal.SIGINT else Cause.CLUSTER)

    def end_is_near(self, when: float) -> None:
        """Of the job: when, in seconds since 1970."""
        if not self.asked:
            clock = time.strftime("%H:%M:%S", time.localtime(when))
            say(f"the job ends at {clock}: stopping after this step; a checkpoint follows.")
        self.asked = max(self.asked, Cause.CLUSTER)

    def agree(self, most: Callable[[int], int]) -> bool:
        """Whether the run must stop here. most: the largest number of all processes; each of them comes here at this moment of the run."""
        agreed = most(int(self.asked))
        with self._lock:
            self._begun = True
        return bool(agreed)

    # ----------------------------------------------------------------------------------------------------------- the owner

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._watch = threading.Thread(target=self._leave_a_long_start, name="signals", daemon=True)
            self._watch.start()
            self.hold(PREEMPTING)  # Ctrl-C is Python's exception as long as nothing is trained
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
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
        """What a start meets when it, or another process a moment before, was told to stop: then the stop is the word, and no traceback."""
        deadline = time.monotonic() + PATIENCE
        while self.several and not self._begun and not self.asked and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.asked and not self._begun:
            self._leave()

    # ----------------------------------------------------------------------------------------------------- before the first step

    def _leave_a_long_start(self) -> None:
        """The thread: the numbers of the signals come through a pipe, whatever the main thread does."""
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
                self.asked = max(self.asked, cause)  # the main thread may not have come to it
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
    """In a process that helps this one (a worker of a loader): SLURM may send a signal to all of a job's, and the run still needs it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _forget() -> None:
    """A fork is a process of its own: what it is sent is not meant for the run."""
    held = [number for number in SIGNALS if isinstance(getattr(signal.getsignal(number), "__self__", None), Stop)]
    if held:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
            for number in held:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)

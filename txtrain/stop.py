"""Ctrl-C and SIGTERM end a run at the next step, with a complete checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Preempted(Exception):
    """The run was asked to stop and its checkpoint is complete."""


class Stop:
    """A flag that the signals set; `with Stop() as stop:` owns them, and gives them back.

    A handler that saved by itself would do so in the middle of a step. Lightning sets handlers of its own when training starts, and
    would answer a SIGTERM with an exception: `hold` takes the signals again after that.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def hold(self) -> None:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:  # the console may be in the middle of a line and hold its lock: write past it
            os.write(2, f"\ntxtrain: {signal.Signals(number).name}: stopping after this step; a checkpoint follows.\n".encode())
        self.requested = True

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.hold()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

"""Child processes that end with their parent, also where it is killed (Linux; elsewhere they go on)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(orphaned: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """In a child: it gets the signal when the thread that made it ends. parent: a pid that may have ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, orphaned)
        if parent not in (None, os.getppid()):  # the parent has ended already
            os.kill(os.getpid(), signal.SIGKILL)

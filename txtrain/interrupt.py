"""Ctrl-C before there is anything to save. It stands in front of every other import, and so imports next to nothing itself."""

import os
import signal


class EndsAtOnce:
    """`with EndsAtOnce():` Ctrl-C ends the process with one line and exit code 1, while modules are imported and the command line is read.

    Python's own answer is an exception, and one that is raised within an import comes out as a traceback, as another exception, or
    not at all. Whoever has an answer of their own, or was told to ignore the signal, keeps it.
    """

    def __init__(self) -> None:
        self.held = False

    def __enter__(self) -> None:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            try:
                signal.signal(signal.SIGINT, _end)
            except ValueError:  # not the main thread, to which Python delivers signals
                return
            self.held = True

    def __exit__(self, *exception: object) -> None:
        if self.held:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: object) -> None:
    os.write(2, b"\ntxtrain: interrupted.\n")
    os._exit(1)

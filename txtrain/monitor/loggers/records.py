"""Log records of libraries that cannot be written, as W&B's debug.log on a full disk: said once, and at the end how many they were.

Python's own answer is a traceback on stderr for each. W&B reads stderr along and logs what it meets there, which fails again: millions of
lines, each traceback within another.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from txtrain.parallel.early_signals import say


@contextlib.contextmanager
def failures_said_once() -> Iterator[None]:
    """Of every handler in the process. Where one has failed the silence stays: libraries log until Python ends."""
    before, lost = logging.Handler.handleError, 0

    def count(self: logging.Handler, record: logging.LogRecord) -> None:
        nonlocal lost
        lost += 1
        if lost == 1:
            said = " ".join(str(sys.exc_info()[1]).split())
            say(f"a log record of {record.name} could not be written ({said[:300]}). The training goes on; further ones are only counted.")

    logging.Handler.handleError = count  # type: ignore[method-assign]
    try:
        yield
    finally:
        if lost:
            say(f"log records that could not be written: {lost:,}.")
        else:
            logging.Handler.handleError = before  # type: ignore[method-assign]

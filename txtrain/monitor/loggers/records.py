"""Reports once if libraries cannot write log records (W&B's debug.log on a full disk), and at the end how many.

Python itself prints a traceback to stderr for each. W&B captures stderr and logs it, which fails again: millions of
lines of nested tracebacks.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from txtrain.parallel.early_signals import say


@contextlib.contextmanager
def failures_said_once() -> Iterator[None]:
    """For every handler in the process. After a failure this stays in force: libraries log until Python ends."""
    before, lost = logging.Handler.handleError, 0

    def count(self: logging.Handler, record: logging.LogRecord) -> None:
        nonlocal lost
        lost += 1
        if lost == 1:
            said = " ".join(str(sys.exc_info()[1]).split())
            say(
                f"a log record of {record.name} could not be written ({said[:300]}). "
                "The training goes on; further ones are only counted."
            )

    logging.Handler.handleError = count  # type: ignore[method-assign]
    try:
        yield
    finally:
        if lost:
            say(f"log records that could not be written: {lost:,}.")
        else:
            logging.Handler.handleError = before  # type: ignore[method-assign]

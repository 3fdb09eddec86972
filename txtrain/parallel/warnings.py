"""Python's warnings in a run of several processes: each text once, with the rank that raised it first."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def marked(rank: int, is_new: Callable[[str], bool]) -> Iterator[None]:
    """Print this rank's warnings as one line `[rank N] file:line: Category: text`, unless another rank has printed it.

    is_new: whether no process has asked for this key before: true for exactly one caller per key.
    """

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:
        text = f"{category.__name__}: {message}"
        if is_new("warning/" + hashlib.sha256(text.encode()).hexdigest()):
            print(f"[rank {rank}] {filename}:{lineno}: {text}", file=file or sys.stderr, flush=True)

    before: Any = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before

"""Progress of a slow preparation: a bar on a terminal, one line at the end elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self


class Progress:
    """Counts bytes. total: None if unknown."""

    def __init__(self, label: str, total: int | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True, highlight=False)
        columns = (
            TextColumn("{task.description}"), BarColumn(),
            DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(label, total=total)
        self.n_bytes, self._began = 0, time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, n_bytes: int) -> None:
        self.n_bytes += n_bytes
        self._bar.advance(self._task, n_bytes)

    def done(self, line: str) -> None:
        """Print the final line, with {size} and {seconds} filled in."""
        seconds = f"{time.monotonic() - self._began:.1f} s"
        self._console.print(line.format(size=f"{self.n_bytes / 1e6:.1f} MB", seconds=seconds))

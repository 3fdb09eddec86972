"""The screen during training: a progress bar and tables on a terminal, time-stamped lines elsewhere."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterable
from typing import IO, Any, Literal, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from txtrain.errors import visible
from txtrain.monitor.metrics_csv import COLUMNS, Row
from txtrain.monitor.start_screen import duration
from txtrain.parallel.early_signals import say

Verbosity = Literal["quiet", "normal", "verbose"]
_BAR = 5  # least width in columns


class _Screen:
    """stdout that never raises: output that a closed terminal or a full disk refuses is lost, and reported once."""

    lost = False

    @property
    def rich_proxied_file(self) -> _Screen:
        """While a bar is shown, rich replaces sys.stdout."""
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(sys.stdout, "rich_proxied_file", sys.stdout), name)

    def write(self, text: str) -> None:
        self._try("write", text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, what: str, *arguments: str) -> None:
        try:
            self.__getattr__(what)(*arguments)
        except OSError as e:
            if not self.lost:
                self.lost = True
                say(f"the screen cannot be written to ({e}). The training goes on without it.")


class Display:
    """Lines of text, and a progress bar below them on a terminal that can move its cursor.

    Args:
        silent: print nothing: another rank does.
        verbosity: quiet: only warnings and the end; verbose: also how the time of each logged step was spent.
    """

    def __init__(self, console: Console | None = None, silent: bool = False, verbosity: Verbosity = "normal") -> None:
        self.console = console or Console(file=cast(IO[str], _Screen()), highlight=False, soft_wrap=True, quiet=silent)
        self.verbosity = verbosity
        self.total: int | None = None
        self._moves = self.console.is_terminal and not self.console.is_dumb_terminal
        self._stamped = False
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    # ------------------------------------------------------------------------------------------------------------ lines

    def tell(self, *lines: str, style: str | None = None) -> None:
        """Print lines even if verbosity is quiet. They are not wrapped: a path in one can be copied."""
        for text in lines:
            self.console.print(self._stamp() + visible(text), style=style, markup=False)

    def line(self, text: str, style: str | None = None) -> None:
        """Print a line, wrapped between words on a terminal."""
        if self.verbosity != "quiet":
            self.console.print(self._stamp() + visible(text), style=style, markup=False, soft_wrap=not self._moves)

    def lines(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.line(text)

    def text(self, text: str) -> None:
        """Print what the model wrote."""
        if self.verbosity != "quiet":
            shown = visible(" ".join(text.split()))
            shown = f"  {shown[:160]}{'...' if len(shown) > 160 else ''}"
            self.console.print(shown, style="dim", markup=False, soft_wrap=not self._moves)

    def table(self, rows: Iterable[tuple[str, str]]) -> None:
        """Print names and values. On a terminal long values are wrapped; elsewhere a row is a line, for grep."""
        if self.verbosity == "quiet":
            return
        rows = [(name, visible(text)) for name, text in rows]  # paths, and values of a stranger's run
        if not self._moves:
            for name, text in rows:
                self.console.print(f"  {name:<14}{text}", markup=False)
            return
        grid = Table.grid(padding=(0, 2), pad_edge=True)
        grid.add_column(style="cyan", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, text in rows:
            grid.add_row(name, Text(text))
        self.console.print(grid, soft_wrap=False)

    def _stamp(self) -> str:
        """The time before each line once training has begun; in a log with the date, since jobs run over midnight."""
        if not self._stamped:
            return ""
        return datetime.datetime.now().strftime("%H:%M:%S  " if self._moves else "%Y-%m-%d %H:%M:%S  ")

    # ------------------------------------------------------------------------------------------------------------ steps

    def start(self, step: int, total: int | None) -> None:
        """Training begins after `step` steps. total: None if only a time limit ends the run."""
        self.total, self._stamped = total, True
        if self._moves and not self.console.quiet and self.verbosity != "quiet" and self._bar is None:
            # The bar takes the width that the text leaves.
            columns = (
                TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}", markup=False),
            )
            self._bar = Progress(*columns, console=self.console, refresh_per_second=4, expand=True)
            self._task = self._bar.add_task("train", total=self.total, completed=step, text="")
            self._bar.start()

    def step(self, step: int) -> None:
        """A step is done; costs next to nothing."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def row(self, row: Row) -> None:
        """A logged step, as it is in metrics.csv."""
        loss = f"loss {row['loss']:.4f}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, text=self._fitting(row, [loss, *self._speed(row)]))
        else:
            of = "" if self.total is None else f"/{self.total}"
            self.line("  ".join([f"step {row['step']}{of}", loss, f"lr {row['lr']:.2e}", *self._speed(row)]))
        if self.verbosity == "verbose":
            self.line(f"step {row['step']}  {_details(row)}", style="dim")
        if row.get("val_loss") is not None:
            self.line(f"step {row['step']}  {_validation(row)}", style="bold")

    def _speed(self, row: Row) -> list[str]:
        parts = [f"{row['tokens_per_second']:,.0f} tokens/s"]
        if row.get("mfu") is not None:
            parts.append(f"MFU {row['mfu']:.1%}")
        step, seconds = row["step"], row["seconds"]
        if self.total is not None and step and seconds:
            parts.append(f"{duration((self.total - step) * seconds / step)} left")
        return parts

    def _fitting(self, row: Row, parts: list[str]) -> str:
        """As many parts as leave room for the bar; the loss and the time left are dropped last."""
        room = self.console.width - len(f"step {row['step']}/{self.total}") - _BAR - 4
        while len(parts) > 1 and len("  ".join(parts)) > room:
            del parts[-2 if len(parts) > 2 else -1]
        return "  ".join(parts)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._stamped = self._stamped and not self._moves  # what follows on a terminal is printed at once


def _details(row: Row) -> str:
    """More than a bar has room for: gradient norm, shares of the time, HFU, goodput, memory."""
    times = {name.removeprefix("time/"): value or 0.0 for name, value in row.items() if name.startswith("time/")}
    whole = sum(times.values()) or 1.0
    parts = [f"gradient norm {row.get('grad_norm') or 0:.3f}"]
    parts += [
        f"{name.replace('_', '/')} {seconds / whole:.0%}" for name, seconds in times.items() if seconds / whole >= 0.005
    ]
    parts += [
        f"{name} {row[key]:.1%}" for name, key in (("HFU", "hfu"), ("goodput", "goodput")) if row.get(key) is not None
    ]
    return "  ".join(parts + ([f"memory {row['memory_gib']:.2f} GiB"] if row.get("memory_gib") is not None else []))


def _validation(row: Row) -> str:
    """The validation loss, then the objective's other metrics."""
    names = {"val_loss": "validation loss", "perplexity": "perplexity", "bits_per_byte": "bits/byte"}
    own = (name for name in row if name not in COLUMNS and f"val_{name}" not in row)
    names |= {name: name.removeprefix("val_").replace("_", " ") for name in own}
    return "  ".join(
        f"{text} {value:{'.2f' if value >= 10 else '.4f'}}" for name, text in names.items()
        if (value := row.get(name)) is not None
    )

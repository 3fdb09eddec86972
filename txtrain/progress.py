"""What is shown while a run trains: a bar on a terminal, time-stamped lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from txtrain.metrics import COLUMNS, Row
from txtrain.screen import duration


class Display:
    """Lines of text, and one bar below them where there is a terminal."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True, quiet=quiet)
        self.total: int | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def line(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False)

    def lines(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.line(text)

    def start(self, step: int, total: int | None) -> None:
        """Training begins after `step` steps. total: None where only the time ends the run."""
        self.total = total
        if self.console.is_terminal and not self.console.quiet and self._bar is None:
            # What the text leaves is the bar's: 80 columns hold both.
            columns = TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=None), TextColumn("{task.fields[text]}", markup=False)
            self._bar = Progress(*columns, console=self.console, refresh_per_second=4, expand=True)
            self._task = self._bar.add_task("train", total=self.total, completed=step, text="")
            self._bar.start()

    def step(self, step: int) -> None:
        """A step is done; costs nothing worth counting."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def row(self, row: Row) -> None:
        """A logged step, as it is in metrics.csv."""
        loss, rest = f"loss {row['loss']:.4f}", self._speed(row)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, text=f"{loss}  {rest}")
        else:
            of = "" if self.total is None else f"/{self.total}"
            self.line(f"{time.strftime('%H:%M:%S')}  step {row['step']}{of}  {loss}  lr {row['lr']:.2e}  {rest}")
        if row.get("val_loss") is not None:
            self.line(f"{time.strftime('%H:%M:%S')}  step {row['step']}  {_validation(row)}", style="bold")

    def _speed(self, row: Row) -> str:
        parts = [f"{row['tokens_per_second']:,.0f} tokens/s"]
        if row.get("mfu") is not None:
            parts.append(f"MFU {row['mfu']:.1%}")
        step, seconds = row["step"], row["seconds"]
        if self.total is not None and step and seconds:
            parts.append(f"{duration((self.total - step) * seconds / step)} left")
        return "  ".join(parts)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _validation(row: Row) -> str:
    """The loss first, then what the objective tells of validation beside it."""
    names = {"val_loss": "validation loss", "perplexity": "perplexity", "bits_per_byte": "bits/byte"}
    own = (name for name in row if name not in COLUMNS and f"val_{name}" not in row)
    names |= {name: name.removeprefix("val_").replace("_", " ") for name in own}
    return "  ".join(f"{text} {value:{'.2f' if value >= 10 else '.4f'}}" for name, text in names.items() if (value := row.get(name)) is not None)

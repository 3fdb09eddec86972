"""metrics.csv: one row a logged step, never a gap and never a double, whatever happens to the process."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from txtrain.errors import ConfigError
from txtrain.ground import files
from txtrain.ground.plain_files import read_text, shorten
from txtrain.parallel.timers import PHASES

EXACT = ("step", "tokens", "loss", "val_loss", "perplexity", "bits_per_byte", "lr", "grad_norm", "skipped_steps", "loss_spikes")  # whatever happens to a run
WALL_CLOCK = ("tokens_per_second", "mfu", "hfu", "seconds", "goodput", "memory_gib", *(f"time/{name}" for name in PHASES))  # what the clock and the machine say
COLUMNS = EXACT + WALL_CLOCK

_LIMIT = 1 << 30  # bytes of a file of some millions of steps
Row = Mapping[str, float | int | None]


class MetricsFile:
    """A CSV file with a fixed header, appended to.

    Args:
        columns: step first; those that the file has beside them stay, empty from here on.
        keep: the rows up to this step stay; later ones, and a line that a killed run left unfinished, go.
    """

    def __init__(self, path: Path, columns: tuple[str, ...] = COLUMNS, keep: int = 0) -> None:
        rows = [row for row in read(path) if int(row["step"]) <= keep] if keep else []
        self.columns = columns + tuple(name for row in rows[:1] for name in row if name not in columns)
        files.write(path, "".join(map(self._line, [dict(zip(self.columns, self.columns, strict=True)), *rows])))
        self.latest = _latest(rows)  # of each column, the last value written
        self._file: TextIO = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115  (closed by close)

    def _line(self, row: Mapping[str, Any]) -> str:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerow(["" if row.get(name) is None else row[name] for name in self.columns])
        return out.getvalue()

    def write(self, row: Row) -> None:
        """Floats are written so that reading them back gives the same number; None is an empty cell."""
        self.latest |= {name: value for name, value in row.items() if value is not None}
        self._file.write(self._line(row))
        self._file.flush()

    def sync(self) -> None:
        """Everything written is on the disk when this returns."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv, also of one that is being written: without its unfinished last line.

    Raises:
        ConfigError: a cell is no number.
    """
    if not path.exists():
        return []
    text = read_text(path, _LIMIT)
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    try:
        rows = [row for row in reader if None not in row.values() and None not in row]
        if not all(row["step"].isdecimal() for row in rows):
            raise ValueError("a step is no number")
        _latest(rows)
    except (ValueError, KeyError, csv.Error) as e:
        raise ConfigError(f"{path} must have rows of numbers, each with a step, but has not: {shorten(e)}.") from e
    return rows


def latest(path: Path) -> dict[str, float]:
    """Of each column, its last value."""
    return _latest(read(path))


def _latest(rows: list[dict[str, str]]) -> dict[str, float]:
    return {name: float(text) for row in rows for name, text in row.items() if text}

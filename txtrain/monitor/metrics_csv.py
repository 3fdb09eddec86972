"""metrics.csv: one row for each logged step, without gaps or duplicates however processes end."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import xxhash

from txtrain.checkpoint.run_folder import RunFolder, aside
from txtrain.errors import ConfigError, shorten
from txtrain.ground import files
from txtrain.ground.plain_files import read_bytes
from txtrain.parallel.timers import PHASES

# Equal in every run of the same configuration, interrupted or not.
EXACT = (
    "step", "tokens", "loss", "val_loss", "perplexity", "bits_per_byte",
    "lr", "grad_norm", "skipped_steps", "loss_spikes",
)
# Dependent on the clock and the machine.
WALL_CLOCK = (
    "tokens_per_second", "mfu", "hfu", "seconds", "goodput", "memory_gib", *(f"time/{name}" for name in PHASES),
)
COLUMNS = EXACT + WALL_CLOCK

_LIMIT = 1 << 30  # bytes: a file of some millions of steps
Row = Mapping[str, float | int | None]


class MetricsFile:
    """A CSV file with a fixed header, appended to.

    Args:
        columns: step first; other columns that the file already has stay, empty from here on.
        keep: the last step whose row stays; later rows and an unfinished line of a killed run are removed.
        n_kept: their number, if known: damage behind them is then ignored.
    """

    def __init__(
        self, path: Path, columns: tuple[str, ...] = COLUMNS, keep: int = 0, n_kept: int | None = None
    ) -> None:
        rows = [row for row in read(path, n_kept) if int(row["step"]) <= keep] if keep else []
        self._digest, self.n_rows = digest_of(rows), len(rows)
        self.columns = columns + tuple(name for row in rows[:1] for name in row if name not in columns)
        files.write(path, "".join(map(self._line, [dict(zip(self.columns, self.columns, strict=True)), *rows])))
        self.latest = _latest(rows)  # the last value of each column
        self._file: TextIO = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115  (closed by close)

    def _line(self, row: Mapping[str, Any]) -> str:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerow(
            ["" if row.get(name) is None else row[name] for name in self.columns]
        )
        return out.getvalue()

    def write(self, row: Row) -> None:
        """Floats are written so that they are read back exactly; None is an empty cell."""
        self.latest |= {name: value for name, value in row.items() if value is not None}
        line = self._line(row)
        self._digest.update(_canonical(dict(zip(self.columns, next(csv.reader([line])), strict=True))))
        self.n_rows += 1
        self._file.write(line)
        self._file.flush()

    @property
    def hash(self) -> str:
        """Checksum of the rows so far; see `digest_of`."""
        return self._digest.hexdigest()

    def sync(self) -> None:
        """Write everything to the disk before returning."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read(path: Path, n: int | None = None) -> list[dict[str, str]]:
    """The rows of a metrics.csv, which may be in use: an unfinished last line is left out.

    Args:
        n: read only the first n rows, whatever follows, as after a power cut.

    Raises:
        ConfigError: a row has more or fewer cells than the header, or one that is not a number.
    """
    if not path.exists():
        return []
    raw = read_bytes(path, _LIMIT)
    text = raw[: raw.rfind(b"\n") + 1].decode("utf-8-sig", errors="replace")  # what is not UTF-8 is not a number
    reader, rows = csv.reader(io.StringIO(text)), list[dict[str, str]]()
    try:
        header = next(reader, ["step"])
        if "step" not in header or "\ufffd" in "".join(header):
            raise ValueError(f"its names are {header}")
        while n is None or len(rows) < n:
            if (cells := next(reader, None)) is None:
                break
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells under {len(header)} names")
            row = dict(zip(header, cells, strict=True))
            if not row["step"].isdecimal():
                raise ValueError(f"`step` is {row['step']!r}")
            _latest([row])
            rows.append(row)
    except (ValueError, csv.Error) as e:
        raise ConfigError(
            f"{path}, line {reader.line_num}, must be a row of numbers, each with a step, but is not: {shorten(e)}."
        ) from e
    return rows


def digest_of(rows: Iterable[Mapping[str, str]]) -> xxhash.xxh3_64:
    """Checksum of rows, independent of the order of columns and of empty ones."""
    digest = xxhash.xxh3_64()
    for row in rows:
        digest.update(_canonical(row))
    return digest


def _canonical(row: Mapping[str, str]) -> bytes:
    return ("\x1f".join(f"{name}={row[name]}" for name in sorted(row) if row[name]) + "\n").encode()


def check_rows(place: RunFolder) -> str | None:
    """Check that the rows up to the run's checkpoint are those that it was written with.

    Returns:
        A warning if the whole file is gone.

    Raises:
        ConfigError: a row is lost or damaged; names the line.
    """
    path, state = place.path / "metrics.csv", place.state
    if not path.exists():
        return f"{path} is gone: it begins anew with step {place.first_step + 1}." if state.rows else None
    try:
        rows = [row for row in read(path, state.rows) if int(row["step"]) <= place.kept]
        if state.rows is not None and (len(rows), digest_of(rows).hexdigest()) != (state.rows, state.rows_hash):
            upto = f"the {state.rows:,} rows up to step {place.kept:,} that were written"
            what = f"has {len(rows):,} of them" if len(rows) < state.rows else "one of them has changed"
            raise ConfigError(f"{path} must have {upto}, but {what}.")
    except ConfigError as e:
        raise ConfigError(*e.problems, f"The run can go on without its earlier rows: {aside(path)}") from e
    return None


def latest(path: Path) -> dict[str, float]:
    """The last value of each column."""
    return _latest(read(path))


def _latest(rows: list[dict[str, str]]) -> dict[str, float]:
    return {name: float(text) for row in rows for name, text in row.items() if text}

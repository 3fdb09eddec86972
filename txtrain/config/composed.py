"""A composed job: the typed configuration and how it came about, and its file for a process of our own."""

from __future__ import annotations

import dataclasses as dc
import time
from pathlib import Path
from typing import Any

import yaml

from txtrain.config.user_code import import_user
from txtrain.ground.convert import build, plain

NOTES = "_txtrain"  # the node in which the loader hands over what is not configuration


@dc.dataclass(frozen=True)
class Composed:
    """A validated configuration and how it came about.

    Attributes:
        grafts: axis -> {from, to, kept, dropped} for each axis that is not the family's own.
        given: keys that the user set.
        folder: under runs/<name>/, where config.run_dir is null; None: the time or the SLURM job. Of `-m` numbered.
        notes: sentences for the start screen.
        start: when the process was started that runs it, by the system's clock.
    """

    config: Any
    grafts: dict[str, dict[str, Any]]
    given: list[str]
    folder: str | None = None
    notes: tuple[str, ...] = ()
    start: float = dc.field(default_factory=time.time, compare=False)


def to_file(job: Composed, file: Path) -> None:
    """What `from_file` reads in a process that we start."""
    notes = {"grafts": job.grafts, "given": job.given, "folder": job.folder, "notes": list(job.notes)}
    raw = plain(job.config) | {NOTES: notes}
    file.write_text(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), encoding="utf-8")


def from_file(root: type, file: str | Path) -> Composed:
    """A job that another process has composed: of a sweep, or of a run's first rank, whose file is config.yaml."""
    raw = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    notes = raw.pop(NOTES, {})
    for what in raw["imports"]:
        import_user(what, Path.cwd())
    return Composed(build(root, raw), **{"grafts": {}, "given": [], **notes, "notes": tuple(notes.get("notes", ()))})

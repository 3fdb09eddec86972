"""A composed job: the typed configuration with its origin, and its file for a process that txtrain starts."""

from __future__ import annotations

import dataclasses as dc
import time
from pathlib import Path
from typing import Any

import yaml

from txtrain.config.user_code import import_user
from txtrain.ground.convert import build, plain

NOTES = "_txtrain"  # the node with the loader's notes, which are not configuration


@dc.dataclass(frozen=True)
class Composed:
    """A validated configuration and its origin.

    Attributes:
        grafts: axis -> {from, to, kept, dropped}, for each axis whose option is not the family's own.
        given: keys that the user set.
        folder: in runs/<name>/ if config.run_dir is null; numbered with `-m`. None: named by time or SLURM job.
        notes: sentences for the start screen.
        start: of the process that runs it, in seconds of the system's clock.
    """

    config: Any
    grafts: dict[str, dict[str, Any]]
    given: list[str]
    folder: str | None = None
    notes: tuple[str, ...] = ()
    start: float = dc.field(default_factory=time.time, compare=False)


def default_name(model: str, data: str) -> str:
    """The name of a run that is given none, from the options of these groups."""
    return "-".join(option.replace("/", "-") for option in (model, data) if option)


def to_file(job: Composed, file: Path) -> None:
    """Write a job for `from_file`, in a process that txtrain starts."""
    notes = {"grafts": job.grafts, "given": job.given, "folder": job.folder, "notes": list(job.notes)}
    raw = plain(job.config) | {NOTES: notes}
    file.write_text(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), encoding="utf-8")


def from_file(root: type, file: str | Path) -> Composed:
    """A job composed by another process: a sweep, or the first rank of a run."""
    raw = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    notes = raw.pop(NOTES, {})
    for what in raw["imports"]:
        import_user(what, Path.cwd())
    return Composed(build(root, raw), **{"grafts": {}, "given": [], **notes, "notes": tuple(notes.get("notes", ()))})

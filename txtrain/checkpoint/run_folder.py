"""A run's folder: where it is, what it continues, and the files that say what the run is."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import datetime
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint import save as saving
from txtrain.checkpoint.state import FORMAT, NewerFormat, RunState, check_format
from txtrain.errors import ConfigError, shorten
from txtrain.ground import files, plain_files
from txtrain.ground.convert import among, build, differing, marked, plain
from txtrain.ground.slurm import Job
from txtrain.run_config import RunConfig

# Types of the values that are read from a run.json.
_FACTS: dict[str, Any] = {
    "first_start": float | None, "complete_for": float | None, "starts": int | None, "slurm": dict | None,
    **dict.fromkeys(("status", "started", "ended", "fallback", "wandb_id"), str | None),
    "grafts": dict | None, "init_from": dict | None, "parent": dict | None, "progress": dict | None,
}
_LISTED = 20  # differences in a message


@dc.dataclass
class RunFolder:
    """A run's folder and what the run starts from.

    Attributes:
        checkpoint: what the run continues from; None: it starts anew.
        parent: the checkpoint of another run from which a new one is forked, with that one's step as its first.
        exclusive: the folder must be a new one.
        began: when the run was first started, in seconds since 1970, later by the time during which it was complete.
        left: what an earlier start left behind and could not be removed, as text.
    """

    path: Path
    checkpoint: Path | None = None
    parent: Path | None = None
    exclusive: bool = False
    began: float | None = None
    left: list[str] = dc.field(default_factory=list)
    _owned: bool = dc.field(default=False, repr=False)  # `create` has written run.json
    _made: list[Path] = dc.field(default_factory=list, repr=False)  # folders that this run has created
    _replaced: dict[Path, bytes | None] = dc.field(default_factory=dict, repr=False)  # what `create` has written over
    _config: str = dc.field(default="", repr=False)  # the text of config.yaml
    _lock: Callable[[], object] | None = dc.field(default=None, repr=False)  # releases the folder's lock

    @property
    def state(self) -> RunState:
        """The state at the checkpoint; without one, that of a run at its start."""
        return RunState() if self.checkpoint is None else checkpoint.read_state(self.checkpoint)

    @property
    def source(self) -> Path | None:
        """Where weights and optimizer state come from."""
        return self.checkpoint or self.parent

    @property
    def key(self) -> str:
        """The key of the configuration that names the source."""
        return "resume" if self.checkpoint is not None else "fork"

    @property
    def first_step(self) -> int:
        """Updates before this start."""
        return 0 if self.source is None else checkpoint.read_state(self.source).step

    @property
    def kept(self) -> int:
        """The last step whose row of metrics.csv is kept; later steps are done again."""
        return self.first_step - (self.state.open_row is not None) if self.checkpoint is not None else 0

    @property
    def facts(self) -> dict[str, Any]:
        """The contents of run.json; empty where there is none."""
        return self._read()

    def create(self, config: RunConfig, facts: Mapping[str, Any], start: float | None = None) -> None:
        """Make the folder, write config.yaml and run.json; nothing is written before. start: in seconds since 1970."""
        self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        if self.exclusive:
            self._claim()
        self.path.mkdir(parents=True, exist_ok=True)
        self._own()
        self.left = saving.clean(self.path)
        before = self._read() if self.checkpoint is not None or self._started_before(config) else {}
        ours = (self.path / "config.yaml", self.path / "run.json")
        self._replaced = {file: file.read_bytes() if file.exists() else None for file in ours}
        self.write_config(config, self.path)
        life = _life(before, time.time() if start is None else start)
        self.began = life["first_start"] + life["complete_for"]
        now = {
            "format": FORMAT, **facts, **life, "status": "running", "started": before.get("started") or _now(),
            "ended": None,
        }
        now |= {"parent": None if self.parent is None else self._of_parent(self.parent)}
        kept = ("fallback", "grafts", "init_from", "parent", "wandb_id", "progress")  # not in config.yaml
        now |= {key: before[key] for key in kept if before.get(key) and not now.get(key)}
        files.write(self.path / "run.json", json.dumps(now, indent=2) + "\n")
        self._owned = True

    def _started_before(self, config: RunConfig) -> bool:
        """Whether the same run was started here before, and ended before its first checkpoint."""
        there = config.resume == "auto" and (self.path / "config.yaml").exists()
        return there and not differences(_completed(self.path, config), plain(config))

    def _of_parent(self, parent: Path) -> dict[str, Any]:
        logged = RunFolder(parent.parent.parent).facts.get("wandb_id")
        return {"checkpoint": str(parent.resolve()), "step": self.first_step} | ({"wandb_id": logged} if logged else {})

    def _claim(self) -> None:
        """Make the folder under the first free name: two runs may start within one second."""
        first, number = self.path, 1
        while True:
            try:
                return self.path.mkdir(parents=True)
            except FileExistsError:
                number += 1
                self.path = first.with_name(f"{first.name}_{number}")
                self._made = [self.path]

    def discard(self) -> None:
        """Undo `create`: the run cannot start after all. A second call does nothing."""
        for file, before in {} if self.path in self._made else self._replaced.items():
            if before is None:
                file.unlink(missing_ok=True)
            else:
                files.write(file, before)
        self._release()
        if self.path in self._made:
            shutil.rmtree(self.path)
        for parent in self._made:
            with contextlib.suppress(OSError):  # another run has come into it
                parent.rmdir()
        self._made, self._replaced, self._owned = [], {}, False

    def cannot_start(self, kind: object, error: BaseException | None, trace: object) -> None:
        """For `ExitStack.push`, until the first step: a mistake of the user's, or an interrupt, leaves the folder as it
        was, any other error is the run's failure. Does nothing where `create` has not written, as on other ranks."""
        if self._replaced and error is not None:
            if self._owned and isinstance(error, Exception) and not isinstance(error, ConfigError):
                self.end("failed")
            else:
                self.discard()

    def _own(self) -> None:
        """Lock the folder against other processes. The system releases the lock when the process ends, however it ends.

        Raises:
            ConfigError: another process writes to the folder, or has done so since this one chose its checkpoint.
        """
        self._lock = files.lock(self.path)
        if self._lock is None:
            raise ConfigError(
                "`run_dir` must be a folder that no other process writes to, "
                f"but another one is training in {str(self.path)!r}."
            )
        newest = checkpoint.complete(self.path)[-1:]
        if newest and newest != [self.checkpoint]:
            self._release()
            raise ConfigError(
                f"`run_dir`: another process has trained in {str(self.path)!r} since this one looked. "
                "Start again to continue from there."
            )

    def _release(self) -> None:
        if self._lock is not None:
            self._lock()
            self._lock = None

    def write_config(self, config: RunConfig, into: Path) -> None:
        """Write the config.yaml that `txtrain resume=RUN` and `checkpoint=` read."""
        if not self._config:  # its text takes as long as a small save
            resolved = plain(dc.replace(config, run_dir=str(self.path), resume="auto"))
            self._config = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
        files.write(into / "config.yaml", self._config)

    def update(self, **values: Any) -> None:
        """Change some values of run.json."""
        files.write(self.path / "run.json", json.dumps({**self._read(), **values}, indent=2) + "\n")

    def end(self, status: str, **values: Any) -> None:
        values |= {"status": status, "ended": _now()}
        try:
            self.update(**values)
        except OSError:  # the disk is full: without white space the file is no longer than before
            files.overwrite(self.path / "run.json", json.dumps({**self._read(), **values}, separators=(",", ":")))
        finally:
            self._release()

    def stopped(self) -> None:
        """Mark `run.json` as preempted: the process ends before its first step."""
        if self._owned:
            self.update(status="preempted", ended=_now())

    def _read(self) -> dict[str, Any]:
        path = self.path / "run.json"
        if not path.exists():
            return {}
        try:
            found = plain_files.read_json(path, finite=False)
            check_format(found, path)
            plain_files.check_keys(found, str(path), _FACTS)
            plain_files.check_keys(
                found.get("slurm") or {}, f"{path}: slurm", {"job": str | None, "restarts": int | None}
            )
            try:
                datetime.datetime.fromisoformat(found.get("ended") or _now()).timestamp()
            except (ValueError, OverflowError) as e:
                raise ConfigError(f"{path}: `ended` must be a time, but is {found['ended'][:40]!r} instead.") from e
        except NewerFormat:
            raise
        except ConfigError as e:
            raise ConfigError(*e.problems, f"The run can go on without what it says: {aside(path)}") from e
        return found


def aside(path: Path) -> str:
    """The command that moves a file away."""
    where = shlex.quote(str(path))
    return f"mv {where} {where}.damaged"


# ------------------------------------------------------------------------------------------------------------- choosing


def choose(config: RunConfig, given: Sequence[str] = (), name: str | None = None) -> RunFolder:
    """The folder that the run writes to, and the checkpoint that it continues from. Writes nothing.

    Args:
        given: the keys that the user set.
        name: of the folder under runs/<name>/, where config.run_dir is null; by default the SLURM job or the time.

    Raises:
        ConfigError: the run cannot be continued: its checkpoint is damaged, or its config is another.
    """
    if config.resume not in ("auto", "never"):
        named = _named(config, given)
        files.check_writable(named.path, "resume")
        return named
    path, exclusive = _path(config.run_dir, config.name, name)
    files.check_writable(path, "run_dir")
    checkpoint.check_folder(path)
    newest = None if exclusive else checkpoint.newest_of(path, "resume")
    if newest is None:
        return RunFolder(path, parent=None if config.fork is None else _parent(config), exclusive=exclusive)
    if config.resume == "never" and not _again(path):
        raise ConfigError(
            f"`run_dir` must be without checkpoints with resume=never, "
            f"but {str(path)!r} has {len(checkpoint.complete(path))}. "
            "Give another run_dir, or resume=auto to continue that run."
        )
    return _continue(config, path, newest)


def begun_with(run_dir: str | None, name: str, key: str, where: str) -> str | None:
    """Which run of the folder of runs `where` this run was begun with, by that key; None if it was not begun so.

    run_dir, name: of its configuration.
    """
    path, _ = _path(run_dir, name, None)
    before = checkpoint.saved_config(path).get(key) if (path / "config.yaml").exists() else None
    return before if isinstance(before, str) and Path(before).parent == Path(where) else None


def _again(path: Path) -> bool:
    """Whether SLURM has restarted the job that wrote the folder, so that its checkpoints are this run's own."""
    job, before = Job.here(), RunFolder(path)._read().get("slurm") or {}
    return job is not None and job.restarts > 0 and before.get("job") == job.number


def _named(config: RunConfig, given: Sequence[str]) -> RunFolder:
    if "run_dir" in given:
        raise ConfigError(
            f"`run_dir` must not be given with resume={config.resume}: a run is continued in its own folder. "
            "Leave it out."
        )
    newest = checkpoint.locate(config.resume, key="resume")
    if newest.parent.name != checkpoint.FOLDER:
        what = f"a run's folder, or one of its checkpoints in its folder `{checkpoint.FOLDER}`"
        raise ConfigError(
            f"`resume` must be {what}, but {config.resume!r} lies in {newest.parent}. A new run from it: fork={newest}"
        )
    path = newest.parent.parent
    checkpoint.check_folder(path)
    last = checkpoint.newest_of(path, "resume")
    if last is not None and checkpoint.step_of(last) != checkpoint.step_of(newest):
        raise ConfigError(
            f"`resume` must be the newest checkpoint of its run ({last.name}), but is {newest.name} instead: "
            "what came later would be overwritten. Move the later ones away to go back to it."
        )
    return _continue(config, path, newest)


def _continue(config: RunConfig, path: Path, newest: Path) -> RunFolder:
    folder = RunFolder(path, newest)
    folder._read()  # refuses what is damaged, or of a newer format
    checkpoint.verify(newest, "resume")
    different = differences(_completed(newest, config), plain(config))
    _refuse(
        different, config.resume_allow, f"to continue {path}", "Give these values, or train anew in another run_dir"
    )
    checkpoint.check_model(newest, config.model)
    return folder


def _parent(config: RunConfig) -> Path:
    """The checkpoint to fork from: model and type of optimizer must be the same, all else may differ."""
    assert config.fork is not None
    found = checkpoint.locate(config.fork, key="fork")
    checkpoint.verify(found, "fork")
    different = [
        d for d in differences(_completed(found, config), plain(config))
        if d[0].startswith("model.") or d[0] == "optimizer.type"
    ]
    _refuse(
        different, config.resume_allow, f"to fork {found}",
        "Give these values, or start from the weights alone with init_from",
    )
    checkpoint.check_model(found, config.model)
    return found


def _completed(path: Path, config: RunConfig) -> dict[str, Any]:
    """The saved config, with defaults for keys that its version did not have."""
    raw = checkpoint.saved_config(path)
    try:
        completed: dict[str, Any] = plain(build(type(config), raw))
    except ConfigError:  # it has a key that no longer exists: compared as it is
        return raw
    return completed


def _refuse(different: Sequence[tuple[str, Any, Any]], allowed: Sequence[str], why: str, remedy: str) -> None:
    """Raise for keys whose values differ, except those of `allowed` and keys below them."""
    listed = [
        f"`{key}` must be {shorten(repr(old))} {why}, but is {shorten(repr(new))} instead."
        for key, old, new in different
        if not among(key, allowed)
    ]
    if listed:
        more = [f"and {len(listed) - _LISTED:,} more"] if len(listed) > _LISTED else []
        raise ConfigError(*listed[:_LISTED], *more, f"{remedy}, or allow them by name: resume_allow=[KEY, ...].")


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted key, saved and wanted value of each difference that a resumed run must not have."""
    return differing(saved, wanted, free=marked(RunConfig, "free"))


def _path(run_dir: str | None, name: str, folder: str | None) -> tuple[Path, bool]:
    """The folder, and whether it must be a new one. folder: its name under runs/<name>/, if it has one already."""
    if run_dir is not None:
        return files.path_of(run_dir, "run_dir", "a folder"), False
    if folder is not None:  # new by the clock; in a SLURM job a member finds its folder again
        return Path("runs") / name / folder, Job.here() is None
    trial = os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID")
    if trial:  # a W&B agent may run several in one job; a preempted one returns under its id
        return Path("runs") / name / f"sweep-{trial}", False
    if job := Job.here():  # a requeued job keeps its number: it finds its own checkpoints
        return Path("runs") / name / f"slurm-{job.number}", False
    return Path("runs") / name / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), True


# ---------------------------------------------------------------------------------------------------------------- facts


def _life(before: Mapping[str, Any], start: float) -> dict[str, Any]:
    """What run.json says of a run's starts. before: its contents so far.

    complete_for: seconds between the completion of the run and a start that gave it more to do.
    """
    first = before.get("first_start")
    idle = before.get("complete_for") or 0.0
    if before.get("status") == "complete" and before.get("ended"):
        idle += max(0.0, start - datetime.datetime.fromisoformat(before["ended"]).timestamp())
    first = start if first is None else first
    return {"first_start": first, "complete_for": idle, "starts": (before.get("starts") or 0) + 1}


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")

"""A run's folder: where it is, what it continues, and the files that say what the run is."""

from __future__ import annotations

import dataclasses as dc
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from txtrain import checkpoint, files
from txtrain.config import Train
from txtrain.errors import ConfigError
from txtrain.typed import plain

# What may differ when a run is continued: none of it changes which samples a step sees or what is done with them.
FREE = (
    "trainer",
    "strategy",
    "logger",
    "callbacks",
    "save",
    "sample",
    "resume",
    "run_dir",
    "imports",
    "data.micro_batch_size",
    "data.num_workers",
    "data.cache_dir",
)


@dc.dataclass
class RunFolder:
    """path: the folder. checkpoint: what the run continues from; None: it starts anew. exclusive: the folder must be a new one."""

    path: Path
    checkpoint: Path | None = None
    exclusive: bool = False

    @property
    def state(self) -> dict[str, Any]:
        """The counters at the checkpoint; empty for a new run."""
        return {} if self.checkpoint is None else checkpoint.read_state(self.checkpoint)

    def create(self, config: Train, facts: Mapping[str, Any]) -> None:
        """Make the folder and write config.yaml and run.json. Nothing is written before this."""
        if self.exclusive:
            self._claim()
        self.path.mkdir(parents=True, exist_ok=True)
        checkpoint.clean(self.path)
        self.write_config(config, self.path)
        before = self._read() if self.checkpoint is not None else {}
        now = {**facts, "status": "running", "started": before.get("started") or _now(), "ended": None}
        now |= {key: before[key] for key in ("fallback", "grafts") if before.get(key) and not now.get(key)}  # config.yaml does not tell
        files.write(self.path / "run.json", json.dumps(now, indent=2) + "\n")

    def _claim(self) -> None:
        """Two runs may start within one second."""
        first, number = self.path, 1
        while True:
            try:
                return self.path.mkdir(parents=True)
            except FileExistsError:
                number += 1
                self.path = first.with_name(f"{first.name}_{number}")

    def write_config(self, config: Train, into: Path) -> None:
        """`txtrain resume=RUN` and `checkpoint=` need nothing but this."""
        resolved = plain(dc.replace(config, run_dir=str(self.path), resume="auto"))
        files.write(into / "config.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))

    def update(self, **values: Any) -> None:
        """Change some values of run.json."""
        files.write(self.path / "run.json", json.dumps({**self._read(), **values}, indent=2) + "\n")

    def end(self, status: str) -> None:
        self.update(status=status, ended=_now())

    def _read(self) -> dict[str, Any]:
        try:
            read: dict[str, Any] = json.loads((self.path / "run.json").read_text())
            return read
        except FileNotFoundError:
            return {}


# ------------------------------------------------------------------------------------------------------------------ choosing


def choose(config: Train, given: Sequence[str] = (), default: str | None = None) -> RunFolder:
    """The folder that the run writes to, and the checkpoint that it continues from. Writes nothing.

    Args:
        given: the keys that the user set.
        default: the folder where config.run_dir is null; by default runs/<name>/<job or time>.

    Raises:
        ConfigError: the run cannot be continued: its checkpoint is unreadable, or its config is another.
    """
    if config.resume not in ("auto", "never"):
        return _named(config, given)
    path, exclusive = _path(config, default)
    found = checkpoint.complete(path)
    if not found:
        return RunFolder(path, exclusive=exclusive)
    if config.resume == "never":
        raise ConfigError(
            f"`run_dir` must be without checkpoints with resume=never, but {str(path)!r} has {len(found)}. "
            "Give another run_dir, or resume=auto to continue that run."
        )
    return _continue(config, path, found[-1])


def _named(config: Train, given: Sequence[str]) -> RunFolder:
    if "run_dir" in given:
        raise ConfigError(f"`run_dir` must not be given with resume={config.resume}: a run is continued in its own folder. Leave it out.")
    newest = checkpoint.locate(config.resume, key="resume")
    path = newest.parent.parent
    last = checkpoint.complete(path)[-1:]
    if last and checkpoint.step_of(last[0]) != checkpoint.step_of(newest):
        raise ConfigError(
            f"`resume` must be the newest checkpoint of its run ({last[0].name}), but is {newest.name} instead: what came later would "
            "be overwritten. Move the later ones away to go back to it."
        )
    return _continue(config, path, newest)


def _continue(config: Train, path: Path, newest: Path) -> RunFolder:
    checkpoint.verify(newest)
    saved = yaml.safe_load((newest / "config.yaml").read_text())
    different = differences(saved, plain(config))
    if different:
        listed = [f"`{key}` must be {old!r} to continue {path}, but is {new!r} instead." for key, old, new in different]
        raise ConfigError(*listed, "Give these values, or train anew in another run_dir.")
    return RunFolder(path, newest)


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted key, saved and wanted value of everything that must not change when a run is continued."""
    old, new = _flat(saved), _flat(wanted)
    keys = [key for key in {**old, **new} if not any(key == free or key.startswith(free + ".") for free in FREE)]
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _path(config: Train, default: str | None) -> tuple[Path, bool]:
    """The folder, and whether it must be a new one."""
    if config.run_dir is not None or default is not None:
        return Path(config.run_dir or default or "").expanduser(), False
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    if job:  # a requeued job has the same number: it finds its own checkpoints
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        return Path("runs") / config.name / (f"slurm-{job}_{task}" if task else f"slurm-{job}"), False
    return Path("runs") / config.name / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), True


# --------------------------------------------------------------------------------------------------------------------- facts


def environment(device: str) -> dict[str, Any]:
    """What run.json says of the machine and the software."""
    import lightning
    import torch

    import txtrain

    return {
        "versions": {
            "txtrain": txtrain.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
        },
        "git_commit": git_commit(),
        "hardware": {"device": device, "processes": 1, "threads": torch.get_num_threads(), "host": platform.node(), "platform": platform.platform()},
    }


def git_commit() -> str | None:
    """Of the folder in which the run was started, `-dirty` if it has changes; None outside a repository."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")

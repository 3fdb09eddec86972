"""Writes a checkpoint, complete or not at all, and removes old ones."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import json
import math
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from txtrain.checkpoint.format import FOLDER, MARKER, STATE, complete, marker_of, read_state, step_of
from txtrain.checkpoint.state import RunState
from txtrain.errors import ConfigError
from txtrain.ground import files

if TYPE_CHECKING:
    from torch import Tensor

    from txtrain.run_config import SaveConfig


class SaveError(OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


def save(
    path: Path, tensors: Mapping[str, Tensor], state: RunState, beside: Callable[[Path], None], group: Any = None
) -> None:
    """Write a checkpoint under another name, then rename it: a kill at any moment leaves a complete one or none.

    Args:
        beside: writes the other files into the folder that it is given.
        group: the ranks that write together, each its shards; all of them call this. None: this one alone.

    Raises:
        SaveError: a disk is full or gone; raised on all ranks if it is so on one.
    """
    import torch.distributed as dist

    first = group is None or dist.get_rank() == 0
    part = path.with_name(path.name + ".tmp")

    def begin() -> None:
        if part.exists():
            _remove(part)
        part.mkdir(parents=True)

    def write() -> None:
        nonlocal state
        state = dc.replace(state, id=write_tensors(part, tensors, group, state.step))

    def finish() -> None:
        files.write(part / STATE, state.to_json())
        beside(part)
        _seal(part, path)

    try:
        for do in (begin if first else None, write, finish if first else None):
            _alike(do, group)
    except SaveError:
        if first:
            shutil.rmtree(part, ignore_errors=True)
        raise


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], group: Any = None, step: int = 0) -> str:
    """Each rank writes its shards of the tensors, as safetensors.

    Returns:
        On the first rank the id that all of the files have.
    """
    from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

    from txtrain.checkpoint.writer import Writer

    # The public `save` asks each tensor for its state_dict and logs that twice: a third of the time of many small ones.
    writer = Writer(folder, step)
    writer.reset()
    _save_state_dict(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    return writer.id


def _alike(do: Callable[[], None] | None, group: Any) -> None:
    """Do one part of a save; a system error on one rank fails it on all."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.api import CheckpointException

    error = None
    try:
        if do is not None:
            do()
    except OSError as e:
        error = str(e)
    except CheckpointException as e:  # holds the exceptions of all ranks
        met = [exception for exception, _ in e.failures.values()]
        if not all(isinstance(exception, OSError) for exception in met):
            raise
        error = str(met[0])
    errors: list[Any] = [error]
    if group is not None:
        errors = [None] * dist.get_world_size(group)
        dist.all_gather_object(errors, error, group=group)
    if found := [text for text in errors if text is not None]:
        raise SaveError(found[0])


def _seal(part: Path, path: Path) -> None:
    """Sync all files, write the marker last, then rename the folder."""
    old = path.with_name(path.name + ".old")
    marker = marker_of(part)
    for name in marker:
        files.sync(part / name)
    files.write(part / MARKER, json.dumps(marker))
    if path.exists():  # the step is saved again, after a validation that an interrupt had cut short
        path.rename(old)
    part.rename(path)
    files.sync(path.parent)
    if old.exists():
        _remove(old)  # what cannot be removed the next start tries again, and says


def _remove(path: Path) -> str | None:
    """Remove a checkpoint, or what is left of one: invisible at once, even if deleting takes long, or fails, as on NFS
    while another process reads it.

    Returns:
        What is left, and why; None: nothing.
    """
    gone = path.with_name(f"{path.stem.partition('.')[0]}.{secrets.token_hex(4)}.tmp")
    try:
        path.rename(gone)
    except FileNotFoundError:  # by somebody else
        return None
    except OSError as e:
        return f"{path} could not be removed ({e.strerror}): it stays."
    try:
        shutil.rmtree(gone)
    except OSError as e:
        return f"{path} could not be removed ({e.strerror}): the next start tries again to remove {gone.name}."
    return None


def clean(run_dir: Path) -> list[str]:
    """Remove what a killed run left behind. Returns what could not be removed, as text."""
    for old in (run_dir / FOLDER).glob("step_*.old"):
        if not old.with_suffix("").exists():
            old.rename(old.with_suffix(""))
    left = []
    for rest in [*(run_dir / FOLDER).glob("step_*.tmp"), *(run_dir / FOLDER).glob("step_*.old")]:
        if rest.is_dir() and not rest.is_symlink():
            left.append(_remove(rest))
        else:  # none of ours
            rest.unlink()
    return [text for text in left if text is not None]


def scores(run_dir: Path, keep: SaveConfig) -> dict[Path, float | None]:
    """keep.metric, lower for better, of the complete checkpoints whose state is readable, oldest first; None where a
    step has none, or NaN, which would be neither better nor worse than any."""
    found: dict[Path, float | None] = {}
    for path in complete(run_dir):
        with contextlib.suppress(ConfigError):
            value = read_state(path).metrics.get(keep.metric)
            found[path] = None if value is None or math.isnan(value) else keep.sign * value
    return found


def best_of(run_dir: Path, keep: SaveConfig) -> list[Path]:
    """The checkpoints with a metric, the best first; of equal ones the earlier."""
    found = scores(run_dir, keep)
    with_one = [path for path in found if found[path] is not None]
    return sorted(with_one, key=lambda path: (found[path], step_of(path)))


def rotate(run_dir: Path, keep: SaveConfig) -> list[str]:
    """Remove all but the newest keep_last, the keep_best with the best metric, those of every keep_every_n_steps, and
    damaged ones. Returns what could not be removed, as text."""
    found = list(scores(run_dir, keep))
    every = keep.keep_every_n_steps
    kept = {
        *found[-keep.keep_last :], *best_of(run_dir, keep)[: keep.keep_best],
        *(path for path in found if every and step_of(path) % every == 0),
    }
    return [text for path in found if path not in kept and (text := _remove(path)) is not None]

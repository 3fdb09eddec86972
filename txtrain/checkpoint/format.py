"""Checkpoints: `checkpoints/step_00000100/`, complete or absent.

    shard-*.safetensors   model.<parameter>, optimizer.<parameter>.<state> and ema.<parameter>, by canonical name; any
                          number of ranks under any strategy reads them: torch.distributed.checkpoint (DCP) writes them
    state.json            integers of the run, what belongs to this step, and the optimizer's state that is no tensor
    config.yaml tokenizer/
    base.json             of an adapter alone: where its base is, and the hash of the base's weights
    complete              JSON, name -> size and checksum of every file (of a shard that of its header); written last

DCP's own storage keeps its index in a pickle (`.metadata`), and nothing in a checkpoint may be unpickled. So DCP's
safetensors storage is used, which keeps the index in the headers.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash

from txtrain.checkpoint import state as state_file
from txtrain.checkpoint.state import NewerFormat, RunState, ShardState, check_format
from txtrain.data.config import as_it_was
from txtrain.errors import ConfigError, shorten
from txtrain.ground import files, plain_files
from txtrain.ground.plain_files import check_keys, check_links, read_json
from txtrain.hf.tensor_names import parse_header, read_header

if TYPE_CHECKING:

    from txtrain.model.config import ModelConfig

MARKER, STATE, FOLDER = "complete", "state.json", "checkpoints"
_NAME = re.compile(r"step_([0-9]{8,15})")
T = TypeVar("T")


class LoadError(ConfigError):
    """A checkpoint that a run or a command starts from cannot be used as it is."""


# -------------------------------------------------------------------------------------------------------------- finding


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step:08d}"


def saved_config(folder: Path) -> dict[str, Any]:
    """The config.yaml of a run or a checkpoint, with what version 0.1.0 did where it had no key."""
    return as_it_was(plain_files.read_yaml(folder / "config.yaml"))


def in_full(path: Path) -> Path:
    """The path of a checkpoint from which its name and its run's folder can be read: `.`, `..` and a name alone do not
    say in which folder they lie, and are made absolute."""
    return path if len(path.parts) > 1 and ".." not in path.parts else Path(os.path.abspath(path))


def step_of(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found, path
    return int(found[1])


def is_complete(path: Path) -> bool:
    return (path / MARKER).is_file()


def complete(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [path for path in _named(run_dir) if is_complete(path)]


def _named(run_dir: Path) -> list[Path]:
    return sorted((p for p in (run_dir / FOLDER).glob("step_*") if _NAME.fullmatch(p.name)), key=step_of)


def newest_of(run_dir: Path, key: str) -> Path | None:
    """The newest checkpoint of a run, or None.

    A checkpoint is renamed once it is complete: one with its name but no marker was damaged later, as in a copy that
    was cut short.

    Raises:
        LoadError: the newest has no marker (the error names the newest intact one), or is a link.
    """
    while found := _named(run_dir):
        check_links(found[-1:])
        if is_complete(found[-1]):
            return found[-1]
        if found[-1].exists():  # else the run has removed it since it was found
            verify(found[-1], key)
    return None


def check_folder(run_dir: Path) -> None:
    """Check a run's folder, and all that is in it, before it is written to.

    Raises:
        ConfigError: a link leads out of its folder, or a pipe or a device is there.
    """
    elsewhere = run_dir / FOLDER
    for path in (*_strange(run_dir), *(_strange(elsewhere) if elsewhere.is_symlink() else ())):
        check_links([path])
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ConfigError(f"{path} must be a regular file, but is none.")


def _strange(folder: Path) -> Iterator[Path]:
    """What is no regular file and no folder, also below. The folder of checkpoints may be a link of the user's, and
    W&B, which alone writes into its own, links its log and what the user has it save."""
    waiting, wandb = [str(folder)], str(folder / "wandb")
    while waiting:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting += [entry.path] if entry.path != wandb else []
                elif not entry.is_file(follow_symlinks=False) and (path := Path(entry.path)) != folder / FOLDER:
                    yield path


def newest_run(where: str | Path, key: str) -> str:
    """`where` itself; for `runs/NAME`, a folder of runs, the newest run with a complete checkpoint, which is printed to
    standard error."""
    runs = _runs(files.path_of(where, key))
    if not runs:
        return str(where)
    newest = max(runs, key=_start)
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":  # only the first rank prints
        several, step = f"{len(runs)} run{'s' * (len(runs) > 1)}", step_of(_named(newest)[-1])
        print(f"{key}={where}: {newest} (the newest of {several} with a checkpoint), step {step}", file=sys.stderr)
    return str(newest)


def _runs(path: Path) -> list[Path]:
    """The runs with a checkpoint in a folder of runs; none for any other folder."""
    of_another_kind = (FOLDER, MARKER, "config.yaml", "config.json")
    if not path.is_dir() or any((path / name).exists() for name in of_another_kind):
        return []
    return [run for run in path.iterdir() if _named(run)]


def _start(run: Path) -> tuple[float, str]:
    """When the run was first started; without that in run.json, when its folder was last changed."""
    file = run / "run.json"
    raw = read_json(file, finite=False) if file.exists() else {}
    check_format(raw, file)
    check_keys(raw, str(file), {"first_start": float | None})
    first = raw.get("first_start")
    return run.stat().st_mtime if first is None else float(first), run.name


def nearest_run(path: Path) -> str:
    """` Nearest: RUN.`: the run in whose folder a wrong path lies, or its newest checkpoint; or an empty string."""
    run = next((folder for folder in (*path.parents,)[:2] if complete(folder)), None)
    if run is None:
        return ""
    return f" Nearest: {complete(run)[-1] if path.parent.name == 'checkpoints' else run}."


def locate(where: str | Path, key: str = "checkpoint") -> Path:
    """The checkpoint that `where` means: itself, the newest of a run, or that of the newest run in a folder of runs.

    Raises:
        ConfigError: there is none, or it is not complete any more.
    """
    path = files.path_of(newest_run(where, key), key)
    itself = in_full(path)
    if is_complete(itself):
        return itself
    if itself.is_dir() and _NAME.fullmatch(itself.name):
        verify(itself, key)
    if (found := newest_of(path, key)) is not None:
        return found
    what = "does not exist" if not path.exists() else "is none of them, or has no complete checkpoint yet"
    allowed = "a run's folder, one of its checkpoints, or a folder of runs"
    raise ConfigError(f"`{key}` must be {allowed}, but {str(where)!r} {what}.{nearest_run(path)}")


def exists(where: str | Path) -> bool:
    """Whether `locate` would find one."""
    path = files.path_of(where, "checkpoint")
    return is_complete(path) or bool(_named(path)) or bool(_runs(path))


def on_newest(where: str | Path, key: str, do: Callable[[Path], T]) -> T:
    """`do` applied to the checkpoint that `where` means, or to the next one if a running training removes it meanwhile.

    Raises:
        ConfigError: as `locate` and `do`.
    """
    while True:
        path = locate(where, key)
        try:
            return do(path)
        except Exception:  # whatever a reader meets where files vanish under it; all else is raised
            if path.exists():
                raise


def read_state(path: Path) -> RunState:
    """The state of the run at a checkpoint.

    Raises:
        ConfigError: state.json is damaged, or its step is not the name's.
    """
    state = state_file.read_state(path / STATE)
    if _NAME.fullmatch(path.name) and state.step != step_of(path):
        raise ConfigError(f"{path / STATE}: `step` must be {step_of(path)}, but is {state.step} instead.")
    return state


def verify(path: Path, key: str = "checkpoint", tensors: bool = True) -> None:
    """Check a complete checkpoint against its marker and its shards' headers; tensors are checked when they are read.

    Args:
        key: what an error calls the checkpoint.
        tensors: also check that the shards hold all elements of every tensor; needs torch.

    Raises:
        LoadError: a file is missing, cut short, changed, or of another checkpoint; names the newest intact one.
        NewerFormat: a newer version wrote it.
    """
    if (problem := _problem(path, tensors)) is not None:
        raise damaged(path, problem, key)


def _problem(path: Path, tensors: bool) -> str | None:
    try:
        check_links(path.rglob("*"))
        if not is_complete(path):
            raise ConfigError(f"{MARKER}, the file that is written last, is missing")
        state = read_state(path)  # first, for its format
        _check_shards(path, state)
        _check_marker(path, read_json(path / MARKER), with_checksums=bool(state.id))
        if tensors:
            _check_tensors(path)
    except NewerFormat:
        raise
    except ConfigError as e:
        return e.problems[0].rstrip(".")
    except Exception as e:  # whatever the readers raise on a damaged file
        return f"{type(e).__name__}: {e}".splitlines()[0]
    return None


def damaged(path: Path, problem: str, key: str) -> LoadError:
    """The error, with the newest intact checkpoint of the run and how to use it."""
    others = complete(path.parent.parent) if _NAME.fullmatch(path.name) else []
    whole = next((other for other in reversed(others) if other != path and _is_whole(other)), None)
    where = shlex.quote(str(path))
    if whole is None:
        way_out = "There is no other intact one."
    elif key == "resume":
        way_out = f"The newest intact one is {whole.name}. To go on from it: mv {where} {where}.damaged"
    else:
        way_out = f"The newest intact one: {key}={shlex.quote(str(whole))}"
    return LoadError(f"The checkpoint {path} cannot be read: {problem}. {way_out}")


def _is_whole(path: Path) -> bool:
    try:
        return _problem(path, tensors=False) is None
    except NewerFormat:
        return False


def marker_of(folder: Path) -> dict[str, list[int | str]]:
    """Name -> size and checksum of all files in the folder."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != MARKER)
    return {name: [(folder / name).stat().st_size, _checksum(folder / name)] for name in names}


def _checksum(file: Path) -> str:
    """Of a shard the checksum of its header, which holds those of the tensors."""
    if file.suffix != ".safetensors":
        return xxhash.xxh3_64_hexdigest(plain_files.read_bytes(file, plain_files.TOKENIZER_LIMIT))
    plain_files.check_file(file, limit=None)
    with file.open("rb") as f:
        size = f.read(8)
        return xxhash.xxh3_64_hexdigest(size + f.read(min(int.from_bytes(size, "little"), plain_files.TENSORS_LIMIT)))


def _check_marker(path: Path, marker: Mapping[str, Any], with_checksums: bool) -> None:
    """Raise ConfigError if a file differs from what was written, or was not written with the checkpoint."""
    for name, said in marker.items():
        size, checksum = said if isinstance(said, list) and len(said) == 2 else (said, None)
        if type(size) is not int or (type(checksum) is not str if with_checksums else checksum is not None):
            raise ConfigError(
                f"{path / MARKER}: `{name}` must be the size and the checksum of a file, "
                f"but is {shorten(said)}"
            )
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise ConfigError(f"{path / MARKER}: `{shorten(name)}` must be a file of its folder, but leads out")
        if (found := (path / name).stat().st_size) != size:
            raise ConfigError(f"{name} has another size than when it was written: {found:,} bytes, not {size:,}")
        if checksum is not None and _checksum(path / name) != checksum:
            raise ConfigError(f"{name} has changed since it was written")
    read = [
        STATE,
        *(
            str(p.relative_to(path))
            for pattern in ("*.safetensors", "config.yaml", "base.json", "generation_config.json", "tokenizer/*")
            for p in path.glob(pattern)
        ),
    ]
    if added := [name for name in read if with_checksums and name not in marker]:
        raise ConfigError(f"{added[0]} is not among the files that were written")


def _check_shards(path: Path, state: RunState) -> None:
    """Raise ConfigError if a shard is of another checkpoint, perhaps of the same run."""
    for file in sorted(path.glob("*.safetensors")):
        said = ShardState.of(read_header(file)[0].get("__metadata__"), f"The header of {file.name}")
        if (said.id, said.step) != (state.id, state.step if state.id else 0):
            theirs, ours = (
                f"{id or 'none'}, step {step}" for id, step in ((said.id, said.step), (state.id, state.step))
            )
            raise ConfigError(f"{file.name} is of another checkpoint: its id is {theirs}; that of {STATE} {ours}")


# -------------------------------------------------------------------------------------------------------------- tensors


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a checkpoint that `verify` has passed."""
    from txtrain.checkpoint.reader import read_headers

    return read_headers(path).shapes


def forget_headers() -> None:
    """Free the parsed headers: with thousands of layers they take memory, and a loaded run needs none."""
    from txtrain.checkpoint.reader import parse_headers

    parse_headers.cache_clear()
    parse_header.cache_clear()


def _check_tensors(path: Path) -> None:
    """Check that tensors fill each file without gaps, and that the shards hold all elements of each tensor."""
    from txtrain.checkpoint.reader import read_headers

    held: Counter[str] = Counter()  # elements
    for file in read_headers(path).files.values():
        for name, entry in file.entries.items():
            held[name] += math.prod(entry.shape)
    for name, shape in shapes(path).items():
        if math.prod(shape) != held[name]:
            raise ConfigError(f"{name} must have {math.prod(shape):,} elements, but the files hold {held[name]:,}")


def check_model(path: Path, model: ModelConfig) -> None:
    """Check a config before a model is built from it: it may claim any size, the files cannot.

    Raises:
        ConfigError: the files hold fewer tensors than it has layers, or fewer numbers than parameters.
    """
    from txtrain.hf.tensor_names import check_layers

    if (path / "base.json").is_file():  # an adapter alone: its base is checked when it is opened
        return
    held = {name: math.prod(shape) for name, shape in shapes(path).items() if name.startswith("model.")}
    check_layers(model, frozenset(held), str(path / "config.yaml"))
    if model.n_params > sum(held.values()):
        raise ConfigError(
            f"The checkpoint {path} is of another model: config.yaml describes {model.n_params:,} parameters, "
            f"but the files hold {sum(held.values()):,}."
        )

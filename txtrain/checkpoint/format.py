"""Checkpoints: `checkpoints/step_00000100/`, complete or absent.

    shard-*.safetensors   model.<parameter>, optimizer.<parameter>.<state> and ema.<parameter>, by canonical name: written and read
                          by torch.distributed.checkpoint, so that any number of processes under any strategy can read it
    state.json            the integers of the run, what belongs to this step, and the optimizer's state that is no tensor
    config.yaml tokenizer/
    complete              JSON, name -> size of every file; written last

DCP's own storage keeps its index in a pickle (`.metadata`). Nothing in a checkpoint may be unpickled, so the safetensors storage
of DCP is used: it keeps the index in the headers.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from txtrain.checkpoint import state as state_file
from txtrain.checkpoint.state import RunState
from txtrain.errors import ConfigError
from txtrain.ground import files
from txtrain.ground.plain_files import check_links, read_json

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from txtrain.model.config import ModelConfig
    from txtrain.optim.average import Average
    from txtrain.run_config import SaveConfig

MARKER, STATE, FOLDER = "complete", "state.json", "checkpoints"
_NAME = re.compile(r"step_([0-9]{8,15})")

# ------------------------------------------------------------------------------------------------------------------- finding


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step:08d}"


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


def check_newest(run_dir: Path) -> None:
    """A checkpoint gets its name when it is complete: one that has the name and no marker has lost it since, as in a copy that was cut short.

    Raises:
        ConfigError: the newest is such a one; names the older ones. Or a link leads out of the run's folder.
    """
    if run_dir.is_dir():
        check_links(p for p in run_dir.iterdir() if p.name != FOLDER)
        check_links((run_dir / FOLDER).glob("*"))
    for newest in _named(run_dir)[-1:]:
        if not is_complete(newest):
            verify(newest)


def newest_run(where: str | Path, key: str) -> str:
    """`where` itself; of the folder of a run's name, `runs/NAME`, the newest run that has a complete checkpoint. Says
    which on standard error."""
    runs = _runs(Path(where).expanduser())
    if not runs:
        return str(where)
    newest = max(runs, key=_start)
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":  # of several ranks one says it
        several, step = f"{len(runs)} run{'s' * (len(runs) > 1)}", step_of(complete(newest)[-1])
        print(f"{key}={where}: {newest} (the newest of {several} with a checkpoint), step {step}", file=sys.stderr)
    return str(newest)


def _runs(path: Path) -> list[Path]:
    """The runs with a complete checkpoint in the folder of a run's name; none in a folder of another kind."""
    of_another_kind = (FOLDER, MARKER, "config.yaml", "config.json")
    if not path.is_dir() or any((path / name).exists() for name in of_another_kind):
        return []
    return [run for run in path.iterdir() if complete(run)]


def _start(run: Path) -> tuple[float, str]:
    """When it was first started; where run.json does not tell, when its folder was last changed."""
    try:
        return float(json.loads((run / "run.json").read_text())["first_start"]), run.name
    except (OSError, ValueError, TypeError, KeyError):
        return run.stat().st_mtime, run.name


def locate(where: str | Path, key: str = "checkpoint") -> Path:
    """The checkpoint meant by its own folder, by its run's (the newest), or by that of a run's name (the newest run's).

    Raises:
        ConfigError: there is none.
    """
    path = Path(newest_run(where, key)).expanduser()
    if is_complete(path):
        return path
    found = complete(path)
    if found:
        check_links(found[-1:])
        return found[-1]
    what = "does not exist" if not path.exists() else "is none of them, or has no complete checkpoint yet"
    allowed = "a run's folder, one of its checkpoints, or a folder of runs"
    raise ConfigError(f"`{key}` must be {allowed}, but {str(where)!r} {what}.")


def exists(where: str | Path) -> bool:
    """Whether `locate` would find one."""
    path = Path(where).expanduser()
    return is_complete(path) or bool(complete(path)) or bool(_runs(path))


def read_state(path: Path) -> RunState:
    """The state of the run at a checkpoint.

    Raises:
        ConfigError: state.json is damaged, or its step is not the name's.
    """
    state = state_file.read_state(path / STATE)
    if _NAME.fullmatch(path.name) and state.step != step_of(path):
        raise ConfigError(f"{path / STATE}: `step` must be {step_of(path)}, but is {state.step} instead.")
    return state


def verify(path: Path) -> None:
    """Check a complete checkpoint against its marker, without reading the tensors.

    Raises:
        ConfigError: a file is missing, cut short or unreadable; names the older checkpoints.
    """
    try:
        check_links(path.rglob("*"))
        sizes = read_json(path / MARKER)
        wrong = [name for name, size in sizes.items() if (path / name).stat().st_size != size]
        read_state(path)
        problem = f"{wrong[0]} has another size than when it was written" if wrong else None
        if problem is None:
            _check_tensors(path)
    except ConfigError as e:
        problem = e.problems[0].rstrip(".")
    except Exception as e:  # whatever a damaged file makes the readers say
        problem = f"{type(e).__name__}: {e}".splitlines()[0]
    if problem is None:
        return
    older = [p.name for p in complete(path.parent.parent) if step_of(p) < step_of(path)] if _NAME.fullmatch(path.name) else []
    way_out = f"Move it away to continue from an older one ({', '.join(reversed(older))})." if older else "There is no older one."
    raise ConfigError(f"The checkpoint {path} cannot be read: {problem}. {way_out}")


# ------------------------------------------------------------------------------------------------------------------- tensors


def training_tensors(model: nn.Module, optimizer: Optimizer, average: Average | None = None) -> dict[str, Tensor]:
    """Everything to save, by canonical name; the tensors themselves, so that reading into them in place restores them."""
    from txtrain.optim import state as optimizer_state

    tensors = _weights_of(model)
    tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_state.tensors(model, optimizer).items()}
    return tensors if average is None else tensors | average.tensors()


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a checkpoint that `verify` has passed."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _check_tensors(path: Path) -> None:
    """Of each file that its tensors lie in it without gaps, and of each tensor that its shards are all of it.

    Raises:
        ConfigError: names the file or the tensor. And what DCP's reader says.
    """
    from txtrain.hf.tensor_file import SafetensorsFile

    held: Counter[str] = Counter()  # elements
    for file in sorted(path.glob("*.safetensors")):
        for name, entry in SafetensorsFile(file).entries.items():
            held[name] += math.prod(entry.shape)
    for name, shape in shapes(path).items():
        if math.prod(shape) != held[name]:
            raise ConfigError(f"{name} must have {math.prod(shape):,} elements, but the files hold {held[name]:,}")


def check_model(path: Path, model: ModelConfig) -> None:
    """Before a model is built: a config may claim any size, the files cannot.

    Raises:
        ConfigError: there are fewer tensors than layers, or numbers than parameters.
    """
    from txtrain.hf.tensor_names import check_layers

    held = {name: math.prod(shape) for name, shape in shapes(path).items() if name.startswith("model.")}
    check_layers(model, frozenset(held), str(path / "config.yaml"))
    if model.n_params > sum(held.values()):
        raise ConfigError(
            f"The checkpoint {path} is of another model: config.yaml describes {model.n_params:,} parameters, "
            f"but the files hold {sum(held.values()):,}."
        )


def optimizer_names(path: Path) -> set[str]:
    """`<parameter>.<key>` of every tensor of the optimizer's state. A parameter that had no gradient until then has none."""
    return {name.removeprefix("optimizer.") for name in shapes(path) if name.startswith("optimizer.")}


def load_tensors(path: Path, into: Mapping[str, Tensor], prefix: str = "", group: Any = None) -> None:
    """Read every tensor of `into`, in place; of a tensor that lies over processes each reads its part.

    Args:
        prefix: those of the checkpoint that must all be wanted.
        group: the processes that read together; None: this one alone.

    Raises:
        ConfigError: the names or shapes differ.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    _compare(path, into, prefix)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(dict(into), storage_reader=HuggingFaceStorageReader(str(path)), process_group=group, no_dist=group is None)


def _compare(path: Path, into: Mapping[str, Tensor], prefix: str) -> None:
    from txtrain.hf.pieces import compare

    saved = {name: shape for name, shape in shapes(path).items() if name.startswith(prefix)}
    compare(saved, {name: tuple(tensor.shape) for name, tensor in into.items()}, f"The checkpoint {path}")


def check_weights(path: Path, model: nn.Module) -> None:
    """Whether the checkpoint's weights are those of this model, by name and shape; nothing is read.

    Raises:
        ConfigError: they are not.
    """
    _compare(path, _weights_of(model), prefix="model.")


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def load_training(path: Path, model: nn.Module, optimizer: Optimizer, average: Average | None = None, group: Any = None) -> None:
    """The model's weights, the optimizer's state and the averaged weights from a checkpoint, in place.

    An average that the checkpoint does not have starts from its weights; one that is not wanted is left there. Whether a run may
    begin or end one there is for its configuration to say.
    """
    from txtrain.optim import state as optimizer_state

    numbers = read_state(path).optimizer
    optimizer_state.allocate(optimizer)
    optimizer_state.forget({*optimizer_names(path), *numbers}, model, optimizer)
    tensors = training_tensors(model, optimizer)
    for prefix in ("model.", "optimizer."):
        load_tensors(path, {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}, prefix, group)
    optimizer_state.restore_numbers(numbers, model, optimizer)
    if average is not None and average.values:
        if any(name.startswith("ema.") for name in shapes(path)):
            load_tensors(path, average.tensors(), prefix="ema.", group=group)
        else:
            average.restart()


# -------------------------------------------------------------------------------------------------------------------- writing


class SaveError(OSError):
    """A checkpoint could not be written; those that there were are as they were."""


def save(path: Path, tensors: Mapping[str, Tensor], state: RunState, beside: Callable[[Path], None], group: Any = None) -> None:
    """Write a checkpoint under another name, then give it its own: a kill at any moment leaves a complete one or none.

    Args:
        beside: writes what else belongs into the folder it is given.
        group: the processes that write together, each its parts; all of them call this. None: this one alone.

    Raises:
        SaveError: a disk is full or gone, in all processes where it is so in one.
    """
    import torch.distributed as dist

    first = group is None or dist.get_rank() == 0
    part = path.with_name(path.name + ".tmp")

    def begin() -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)

    def finish() -> None:
        files.write(part / STATE, state.to_json())
        beside(part)
        _seal(part, path)

    try:
        for do in (begin if first else None, lambda: write_tensors(part, tensors, group), finish if first else None):
            _alike(do, group)
    except SaveError:
        if first:
            shutil.rmtree(part, ignore_errors=True)
        raise


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """Each process its parts of the tensors, as safetensors."""
    from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

    from txtrain.checkpoint.writer import Writer

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save_tensors(dict(tensors), storage_writer=Writer(folder), process_group=group, no_dist=group is None)


def _alike(do: Callable[[], None] | None, group: Any) -> None:
    """One part of a save; where the system refuses it to one process, it has failed for all."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.api import CheckpointException

    error = None
    try:
        if do is not None:
            do()
    except OSError as e:
        error = str(e)
    except CheckpointException as e:  # what DCP makes of what its processes met
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
    """All of it on the disk, the marker last; then its own name."""
    old = path.with_name(path.name + ".old")
    sizes = {str(p.relative_to(part)): p.stat().st_size for p in sorted(part.rglob("*")) if p.is_file()}
    for name in sizes:
        files.sync(part / name)
    files.write(part / MARKER, json.dumps(sizes, indent=1))
    if path.exists():  # written again at the same step: after the validation that an interrupt had cut short
        path.rename(old)
    part.rename(path)
    files.sync(path.parent)
    if old.exists():
        shutil.rmtree(old)


def clean(run_dir: Path) -> None:
    """Remove what a killed run left behind."""
    for old in (run_dir / FOLDER).glob("step_*.old"):
        if not old.with_suffix("").exists():
            old.rename(old.with_suffix(""))
    for rest in [*(run_dir / FOLDER).glob("step_*.tmp"), *(run_dir / FOLDER).glob("step_*.old")]:
        shutil.rmtree(rest)


def rotate(run_dir: Path, keep: SaveConfig) -> None:
    """Remove all but the newest keep_last, the keep_best with the lowest validation loss, and those of every keep_every_n_steps."""
    found = complete(run_dir)
    losses = {path: read_state(path).val_loss for path in found}
    validated = sorted((path for path in found if losses[path] is not None), key=lambda path: (losses[path], step_of(path)))
    every = keep.keep_every_n_steps
    kept = {*found[-keep.keep_last :], *validated[: keep.keep_best], *(path for path in found if every and step_of(path) % every == 0)}
    for path in found:
        if path not in kept:
            gone = path.with_name(path.name + ".tmp")  # removed from sight at once, from the disk by and by
            path.rename(gone)
            shutil.rmtree(gone)

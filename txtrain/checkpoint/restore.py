"""Reads a checkpoint's tensors into a model and its optimizer."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from txtrain.checkpoint.format import LoadError, damaged, read_state, shapes
from txtrain.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from txtrain.checkpoint.state import RunState
    from txtrain.hf.pieces import Piece
    from txtrain.optim.average import Average

_SHOWN = 3  # names in a message
_ALLOWED = "To go on all the same, with train and export: allow_nonfinite=true."


@dc.dataclass(frozen=True)
class Reading:
    """How tensors are read.

    Attributes:
        key: what an error calls the checkpoint.
        verify: compare each tensor with its checksum.
        finite: refuse weights that hold NaN or infinity.
        depth: how many adapters lie above the weights.
    """

    key: str = "checkpoint"
    verify: bool = True
    finite: bool = False
    depth: int = 0


READING = Reading()


def training_tensors(model: nn.Module, optimizer: Optimizer, average: Average | None = None) -> dict[str, Tensor]:
    """All tensors to save, by canonical name; not copies, so that reading into them in place restores them."""
    from txtrain.optim import state as optimizer_state

    tensors = _weights_of(model)
    tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_state.tensors(model, optimizer).items()}
    return tensors if average is None else tensors | average.tensors()


def optimizer_names(path: Path) -> set[str]:
    """`<parameter>.<key>` of each tensor of the optimizer's state; a parameter without a gradient so far has none."""
    return {name.removeprefix("optimizer.") for name in shapes(path) if name.startswith("optimizer.")}


def never_updated(path: Path) -> bool:
    """Whether each step until the checkpoint was skipped: an optimizer makes its state at its first update."""
    state = read_state(path)
    return state.step == state.skipped[0]


def load_tensors(
    path: Path, into: Mapping[str, Tensor], prefix: str | tuple[str, ...] = "", group: Any = None,
    how: Reading = READING, without: Container[str] = (),
) -> None:
    """Read every tensor of `into`, in place; of a sharded tensor each rank reads its shard.

    Args:
        prefix: of the checkpoint's tensors, one or several: those with it must be the names in `into`.
        group: the ranks that read together; None: this one alone.
        without: names with the prefix that are not read.

    Raises:
        ConfigError: the names or shapes differ.
        LoadError: a tensor has changed since it was written, or weights are not finite.
    """
    from txtrain.checkpoint.reader import NotFiniteError, Reader

    _compare(path, into, prefix, without)
    reader = Reader(path, how.verify, how.finite)
    met: list[BaseException] = []
    try:
        if group is None:  # DCP plans for each tensor apart, which takes as long as reading a small one
            reader.read(into)
        else:
            from txtrain.checkpoint.planned import read_together

            met = read_together(reader, into, group)
    except ConfigError as e:
        met = [e]
    if other := [exception for exception in met if not isinstance(exception, NotFiniteError)]:
        raise damaged(path, other[0].problems[0], how.key) if isinstance(other[0], ConfigError) else other[0]
    if met:
        strange = {name for exception in met if isinstance(exception, NotFiniteError) for name in exception.problems}
        _refuse_not_finite(path, strange, how.key)


def check_finite(path: Path, model: nn.Module, how: Reading) -> None:
    """Check weights that another reader has read.

    Raises:
        LoadError: they hold NaN or infinity.
    """
    from txtrain.hf.pieces import is_finite

    if how.finite and (strange := [name for name, tensor in model.state_dict().items() if not is_finite(tensor)]):
        _refuse_not_finite(path, strange, how.key)


def check_values(path: Path, pieces: Iterable[Piece], how: Reading, prefix: str = "") -> None:
    """Check weights that are read piece by piece later. prefix: of their names in a message.

    Raises:
        LoadError: one of them has changed since it was written, or is not finite.
    """
    try:
        strange = {f"{prefix}{piece.name}" for piece in pieces if not piece.is_fine(how.finite)}
    except ConfigError as e:
        raise damaged(path, e.problems[0], how.key) from e
    if strange:
        _refuse_not_finite(path, strange, how.key)


def _refuse_not_finite(path: Path, names: Iterable[str], key: str) -> NoReturn:
    held = sorted(names)
    more = f" and {len(held) - _SHOWN:,} more" if len(held) > _SHOWN else ""
    listed = ", ".join(held[:_SHOWN]) + more
    raise LoadError(
        f"`{key}`: the weights in {path} must be finite numbers, but {listed} hold NaN or infinity. {_ALLOWED}"
    )


def _compare(
    path: Path, into: Mapping[str, Tensor], prefix: str | tuple[str, ...], without: Container[str] = ()
) -> None:
    from txtrain.hf.pieces import compare

    saved = {name: shape for name, shape in shapes(path).items() if name.startswith(prefix) and name not in without}
    compare(saved, {name: tuple(tensor.shape) for name, tensor in into.items()}, f"The checkpoint {path}")


def check_weights(path: Path, model: nn.Module) -> None:
    """Check by names and shapes that the checkpoint's weights are this model's; reads no weights.

    Raises:
        ConfigError: they are not.
    """
    _compare(path, _weights_of(model), prefix="model.")


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Those that a checkpoint holds."""
    from txtrain.model.lora import kept

    return {f"model.{name}": tensor for name, tensor in kept(model).items()}


def load_weights(path: Path, model: nn.Module, weights: str = "model", how: Reading = READING) -> None:
    """Read the model's weights in place. weights: `ema` for the averaged ones; what is not averaged is the model's.

    Raises:
        ConfigError: the checkpoint is of another model, or has no averaged weights.
        LoadError: as `load_tensors`.
    """
    averaged, state = check_averaged(path, weights), model.state_dict()
    load_tensors(path, _weights_of(model), "model.", how=how)
    if averaged:
        load_tensors(path, {f"ema.{name}": state[name] for name in averaged}, "ema.", how=how)


def check_averaged(path: Path, weights: str) -> list[str]:
    """Names of the averaged weights that are wanted.

    Raises:
        ConfigError: the checkpoint has none.
    """
    averaged = [name.removeprefix("ema.") for name in shapes(path) if name.startswith("ema.")]
    if weights == "ema" and not averaged:
        raise no_average(path)
    return averaged if weights == "ema" else []


def no_average(path: Path) -> ConfigError:
    return ConfigError(
        f"`weights` must be model, but is ema instead: {path} has no averaged weights. "
        "A run with ema.decay=0.999 keeps them."
    )


def load_training(
    path: Path, model: nn.Module, optimizer: Optimizer, average: Average | None = None, group: Any = None,
    how: Reading = READING,
) -> None:
    """Read the model's weights, the optimizer's state and the averaged weights from a checkpoint, in place.

    An average that the checkpoint lacks starts from its weights. Not read: an average that the run does not keep, and
    what belongs to parameters that are frozen now. The configuration decides whether that is allowed.
    """
    from txtrain.optim import state as optimizer_state

    without = of_frozen(path, model)
    numbers = {name: n for name, n in read_state(path).optimizer.items() if f"optimizer.{name}" not in without}
    optimizer_state.allocate(optimizer)
    saved = {name for name in optimizer_names(path) if f"optimizer.{name}" not in without} | numbers.keys()
    if not saved and (without or never_updated(path)):
        optimizer.state.clear()  # no parameter is trained both there and here, or none had an update yet
    optimizer_state.forget(saved, model, optimizer)
    load_tensors(path, training_tensors(model, optimizer), ("model.", "optimizer."), group, how, without)
    optimizer_state.restore_numbers(numbers, model, optimizer)
    if average is not None and average.values:
        average.restart()
        state, names = read_state(path), shapes(path)
        average.begun = state.step > state.skipped[0]
        if averaged := {name: value for name, value in average.tensors().items() if name in names}:
            load_tensors(path, averaged, "ema.", group, how, without)
            average.begun = _has_begun(state, average.config.every_n_steps)


def _has_begun(state: RunState, every_n_steps: int) -> bool:
    """Whether the average at a checkpoint is of trained weights, by its steps where that was not written yet."""
    latest = state.step - state.step % every_n_steps
    return latest > state.skipped[0] if state.averaged is None else state.averaged


def of_frozen(path: Path, model: nn.Module) -> set[str]:
    """Names of averaged weights and optimizer state that belong to parameters which the model does not train."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    names = [*shapes(path), *(f"optimizer.{name}" for name in read_state(path).optimizer)]
    parts = [(name, *name.split(".", 1)) for name in names]
    return {
        name for name, kind, own in parts
        if (kind == "ema" and own in frozen) or (kind == "optimizer" and own.rpartition(".")[0] in frozen)
    }

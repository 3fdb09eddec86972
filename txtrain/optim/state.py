"""An optimizer's state of each parameter (`optimizer.state[parameter]`), by canonical name: tensors and Python numbers.

A checkpoint holds the tensors as tensors, and the numbers in its state.json, which keeps ints apart from floats. Any
other state would be lost on resume, so it is refused when a run starts.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from txtrain.errors import ConfigError
from txtrain.optim.config import OptimizerConfig
from txtrain.registry import make

Number = int | float | bool
NUMBERS = (int, float, bool)


def tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """`<parameter>.<key>` -> the tensor itself, so that reading into it in place restores it."""
    return {name: value for name, (_, _, value) in _entries(model, optimizer).items() if isinstance(value, Tensor)}


def numbers(model: nn.Module, optimizer: Optimizer) -> dict[str, Number]:
    """`<parameter>.<key>` -> the number."""
    return {name: value for name, (_, _, value) in _entries(model, optimizer).items() if not isinstance(value, Tensor)}


def restore_numbers(saved: Mapping[str, Number], model: nn.Module, optimizer: Optimizer) -> None:
    """Restore what `numbers` returned, into a state that has been allocated.

    Raises:
        ConfigError: the optimizer's numbers have other names or types.
    """
    entries = _entries(model, optimizer)
    mine = numbers(model, optimizer).keys()
    if saved.keys() != mine:
        name = min(saved.keys() ^ mine)
        raise ConfigError(
            f"The checkpoint is of another optimizer: {name} is {'a' if name in saved else 'no'} number there."
        )
    for name, value in saved.items():
        parameter, key, number = entries[name]
        if type(value) is not type(number):
            raise ConfigError(f"The checkpoint is of another optimizer: {name} is {value!r} there, {number!r} here.")
        optimizer.state[parameter][key] = value


def _entries(model: nn.Module, optimizer: Optimizer) -> dict[str, tuple[Tensor, str, Any]]:
    """The whole state: parameter, key and value by canonical name."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    if found := [*_unfit(optimizer, names)]:  # may appear from the second step on: `check` has tried the first
        raise ConfigError(*(_refusal(type(optimizer).__name__, problem) for problem in found))
    return {
        f"{names[p]}.{key}": (p, key, value) for p, state in optimizer.state.items() for key, value in state.items()
    }


def _unfit(optimizer: Optimizer, parameters: Container[Tensor]) -> Iterator[str]:
    """The parts of the state that a checkpoint cannot hold."""
    for owner, state in optimizer.state.items():
        if owner not in parameters:
            yield f"state[{owner!r}], which is no parameter's"
            continue
        for key, value in state.items():
            if not isinstance(value, Tensor) and type(value) not in NUMBERS:
                yield f"{key!r} of a parameter as {type(value).__name__}"


def _refusal(name: str, problem: str) -> str:
    return (
        "`optimizer` must keep tensors, ints, floats or bools, in state[parameter], "
        f"but {name} keeps {problem} instead: a checkpoint would not bring it back."
    )


def allocate(optimizer: Optimizer) -> None:
    """Allocate the optimizer's state to read into, by a first step with gradient 0 at rate 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def forget(saved: Container[str], model: nn.Module, optimizer: Optimizer) -> None:
    """Delete what `allocate` made for parameters without saved state: they have had no gradient yet.

    saved: `<parameter>.<key>`.
    """
    had = {parameter for name, (parameter, _, _) in _entries(model, optimizer).items() if name in saved}
    for parameter in [*optimizer.state] if had else ():  # no match: another optimizer's state, refused when it is read
        if parameter not in had:
            del optimizer.state[parameter]


def check(config: OptimizerConfig, groups: list[dict[str, Any]]) -> None:
    """Make one step with a second optimizer of that kind, on a few zeros, and check its state.

    Args:
        groups: those of the run's optimizer; only their numbers of dimensions are used.

    Raises:
        ConfigError: a checkpoint cannot hold its state.
    """
    tried: Optimizer = make(
        "optimizer", config, params=[{**group, "params": _stand_ins(group["params"])} for group in groups]
    )
    before = [_settings(group) for group in tried.param_groups]
    allocate(tried)
    found = [*_unfit(tried, {parameter for group in tried.param_groups for parameter in group["params"]})]
    for old, group in zip(before, tried.param_groups, strict=True):
        found += [f"{key!r} in a parameter group" for key, value in _settings(group).items() if old.get(key) != value]
    if found:
        raise ConfigError(*(_refusal(config.type, problem) for problem in found))


def _stand_ins(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """One parameter of zeros for each number of dimensions."""
    shapes = {p.ndim: [min(n, 8) for n in p.shape] for p in parameters}
    return [nn.Parameter(torch.zeros(shape)) for shape in shapes.values()]


def _settings(group: Mapping[str, Any]) -> dict[str, str]:
    """A group's settings, except what each step sets. As text, since a tensor changes in place."""
    return {key: repr(value) for key, value in group.items() if key not in ("params", "lr")}

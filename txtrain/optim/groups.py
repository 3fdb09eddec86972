"""Which values of the optimizer hold for which parameters, and the rate of each group at a step."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from txtrain.errors import ConfigError
from txtrain.ground.patterns import unfound
from txtrain.optim.config import OptimizerConfig

Groups = list[dict[str, Any]]


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> Groups:
    """The trainable parameters; those for which the same values hold are in one group."""
    groups: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            settings = config.settings(name, tuple(parameter.shape))
            groups.setdefault(tuple(sorted(settings.items())), {"params": [], **settings})["params"].append(parameter)
    return list(groups.values())


def check_patterns(names: Collection[str], config: OptimizerConfig) -> None:
    """Refuse a group that no parameter is in: a mistyped pattern would leave the rates as they are, unseen.

    Raises:
        ConfigError: a pattern of optimizer.groups is found in no name.
    """
    patterns = {f"optimizer.groups[{i}].pattern": group.pattern for i, group in enumerate(config.groups)}
    if problems := list(unfound(names, patterns)):
        raise ConfigError(*problems)


def set_rates(optimizer: Optimizer, share: float) -> None:
    """Every group's rate, at a step at which the schedule is at `share` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share

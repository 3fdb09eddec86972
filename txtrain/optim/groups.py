"""The optimizer's parameter groups, and the rate of each group at a step."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from txtrain.errors import ConfigError
from txtrain.ground.patterns import unfound
from txtrain.optim.config import Depths, OptimizerConfig

Groups = list[dict[str, Any]]


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> Groups:
    """The trainable parameters, grouped by equal values."""
    groups: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}
    named = list(named)
    depths = Depths.of(name for name, _ in named)
    for name, parameter in named:
        if parameter.requires_grad:
            settings = config.settings(name, tuple(parameter.shape), depths)
            groups.setdefault(tuple(sorted(settings.items())), {"params": [], **settings})["params"].append(parameter)
    return list(groups.values())


def check_patterns(names: Collection[str], config: OptimizerConfig) -> None:
    """Refuse a group without parameters: a mistyped pattern would have no effect, unnoticed.

    Raises:
        ConfigError: a pattern of optimizer.groups matches no name.
    """
    patterns = {f"optimizer.groups[{i}].pattern": group.pattern for i, group in enumerate(config.groups)}
    if problems := list(unfound(names, patterns)):
        raise ConfigError(*problems)


def set_rates(optimizer: Optimizer, share: float) -> None:
    """Set every group's rate to `share` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share

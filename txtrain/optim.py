"""Optimizers, which parameters they decay, and the learning rate as a function of the step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from txtrain.errors import ConfigError

Groups = list[dict[str, Any]]
FUSED = {"cpu", "cuda"}  # devices for which torch has a fused Adam


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, no_decay: Sequence[str]) -> Groups:
    """The trainable parameters in two groups, with and without decay: the latter if a pattern of `no_decay` is found in the dotted name."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            (exempt if any(re.search(p, name) for p in no_decay) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _fused(groups: Groups) -> bool:
    return all(p.device.type in FUSED and p.is_floating_point() for group in groups for p in group["params"])


def adamw(params: Groups, lr: float, betas: tuple[float, float], eps: float) -> Optimizer:
    """Adam with decoupled weight decay (1711.05101)."""
    return torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, fused=_fused(params))


def adam(params: Groups, lr: float, betas: tuple[float, float], eps: float) -> Optimizer:
    """Adam (1412.6980); weight decay, where there is one, is added to the gradient."""
    return torch.optim.Adam(params, lr=lr, betas=betas, eps=eps, fused=_fused(params))


class Constant:
    """The rate as a share of optimizer.lr: linear warm-up, then 1. Base of the others.

    A pure function of the step: nothing has to be saved, and a resumed run cannot be off by one.
    """

    def __init__(self, total_steps: int | None, warmup_steps: int, min_lr_ratio: float) -> None:
        self.total_steps, self.warmup_steps, self.min_lr_ratio = total_steps, warmup_steps, min_lr_ratio

    def __call__(self, step: int) -> float:
        """The share for update number `step`, of which the first is 1. The warm-up ends, with 1, at update `warmup_steps`."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        return self.shape(step)

    def shape(self, step: int) -> float:
        return 1.0


class Linear(Constant):
    """After the warm-up, a straight line to min_lr_ratio at the last step."""

    def __init__(self, total_steps: int | None, warmup_steps: int, min_lr_ratio: float) -> None:
        super().__init__(total_steps, warmup_steps, min_lr_ratio)
        if total_steps is None:
            raise ConfigError(
                f"`scheduler` must be constant where only trainer.max_time ends the run, but is {type(self).__name__.lower()} instead: "
                "it needs a number of steps. Add trainer.max_steps."
            )
        self.decay_steps = max(1, total_steps - warmup_steps)

    def shape(self, step: int) -> float:
        progress = min(1.0, (step - self.warmup_steps) / self.decay_steps)
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * self.fall(progress)

    def fall(self, progress: float) -> float:
        """From 1 at progress 0 to 0 at progress 1."""
        return 1.0 - progress


class Cosine(Linear):
    """After the warm-up, half a cosine to min_lr_ratio at the last step (1608.03983, without restarts)."""

    def fall(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))

"""The base of the optimizers that are written here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Stepper(Optimizer):
    """Calls `update` for each group. State is made with a parameter's first gradient and consists of tensors only."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            if held:
                self.update(held, group)
        return loss

    def update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters that all have gradients, by the group's values."""
        raise NotImplementedError


def kept(state: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A tensor of a parameter's state, sharded like `like`; created as zeros."""
    if name not in state:
        state[name] = torch.zeros_like(like)
    return state[name]

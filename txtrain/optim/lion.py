"""Lion: the sign of an interpolated momentum (2302.06675, program 1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from txtrain.optim.base import Stepper, kept
from txtrain.optim.groups import Groups


class Lion(Stepper):
    def __init__(self, params: Groups, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        self.betas = betas

    def update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = self.betas
        for p in parameters:
            assert p.grad is not None
            momentum = kept(self.state[p], "exp_avg", p)
            direction = momentum.lerp(p.grad, 1 - beta1).sign_()
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
            momentum.lerp_(p.grad, 1 - beta2)

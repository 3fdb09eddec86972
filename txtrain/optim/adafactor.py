"""Adafactor: second moments of a matrix factored into those of its rows and columns (1804.04235, algorithms 4 and 5).

torch.optim.Adafactor differs: its rate is always relative and at most 1/sqrt(step), it has no momentum, and it waits
for the device. T5 sets its rate from outside (1910.10683), so that is the default here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from txtrain.optim.base import Stepper
from txtrain.optim.groups import Groups
from txtrain.optim.sharded import kept_without, local, root_mean_square, summed


class Adafactor(Stepper):
    """State in float32: `row` and `col` over the last two dimensions, `variance` below two dimensions; with beta1 also
    `exp_avg`."""

    def __init__(
        self,
        params: Groups,
        lr: float,
        beta1: float | None,
        beta2_decay: float,
        clip_threshold: float,
        eps: tuple[float, float],
        scale_parameter: bool,
        relative_step: bool,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        self.beta1, self.beta2_decay, self.clip_threshold, self.eps = beta1, beta2_decay, clip_threshold, eps
        self.scale_parameter, self.relative_step = scale_parameter, relative_step

    def update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            assert p.grad is not None
            state, value = self.state[p], local(p).float()
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU: reading it waits for nothing
            t = float(state["step"].add_(1))
            change = self._normalised(local(p.grad).float(), p, state, 1 - t**-self.beta2_decay)
            change = change / (root_mean_square(change, p) / self.clip_threshold).clamp(min=1)
            rate = self._rate(value, p, group, t)
            change = change * rate
            if self.beta1 is not None:
                change = kept(state, "exp_avg", p).lerp_(change, 1 - self.beta1)
            local(p).copy_(value * (1 - group["weight_decay"] * rate) - change)

    def _normalised(self, grad: Tensor, p: Tensor, state: dict[str, Tensor], beta2: float) -> Tensor:
        """The gradient divided by the root of its second moment; this rank's shard."""
        squared = grad.square() + self.eps[0]
        if p.ndim < 2:
            return grad * kept(state, "variance", p).lerp_(squared, 1 - beta2).rsqrt()
        row = kept_without(state, "row", p, -1).lerp_(summed(squared, p, -1) / p.shape[-1], 1 - beta2)
        col = kept_without(state, "col", p, -2).lerp_(summed(squared, p, -2) / p.shape[-2], 1 - beta2)
        mean = summed(row, p, -1, of=-2) / p.shape[-2]
        return grad * (row / mean.unsqueeze(-1)).rsqrt().unsqueeze(-1) * col.rsqrt().unsqueeze(-2)

    def _rate(self, value: Tensor, p: Tensor, group: dict[str, Any], t: float) -> Tensor | float:
        lr: float = group["lr"]
        peak: float = self.defaults["lr"]
        if self.relative_step:  # the schedule's rate is limited; what a group multiplies it by, multiplies the limit
            lr = min(lr, (group["peak_lr"] / peak if peak else 1.0) * t**-0.5)
        return lr * root_mean_square(value, p).clamp(min=self.eps[1]) if self.scale_parameter else lr


def kept(state: dict[str, Tensor], name: str, p: Tensor) -> Tensor:
    """This rank's shard of a state tensor with the parameter's shape, float32."""
    if name not in state:
        state[name] = torch.zeros_like(p, dtype=torch.float32)
    return local(state[name])

"""Muon for the matrices of the hidden layers, AdamW for everything else, in one optimizer.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) moves a matrix by the orthogonal matrix nearest to its
momentum, so that its step has the same size in every direction. Where 2502.16982 matches that size to AdamW's, one rate
serves both.

torch.optim.Muon takes only two-dimensional parameters, so a model needs two optimizers; and its products of sharded
matrices communicate at every iteration, where gathering once would do.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from txtrain.optim.adam import can_fuse
from txtrain.optim.base import Stepper, kept
from txtrain.optim.groups import Groups
from txtrain.optim.sharded import by_matrix

# x <- a x + (b x x' + c (x x')^2) x drives all singular values towards 1: steep at 0, it ends near 1 but not at 1.
QUINTIC = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


class Muon(Stepper):
    """Groups with `use_muon` are Muon's: matrices [A, B] or stacks of them [E, A, B]."""

    def __init__(
        self,
        params: Groups,
        lr: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        ns_dtype: Literal["bfloat16", "float32"],
        adjust_lr_fn: Literal["match_rms_adamw", "original"],
        adamw_betas: tuple[float, float],
        adamw_eps: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "use_muon": False})
        self.momentum, self.nesterov = momentum, nesterov
        self.ns_steps, self.ns_dtype, self.adjust_lr_fn = ns_steps, getattr(torch, ns_dtype), adjust_lr_fn
        self.adamw_betas, self.adamw_eps = adamw_betas, adamw_eps

    def update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        (self._muon if group["use_muon"] else self._adamw)(parameters, group)

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            assert p.grad is not None
            momentum = kept(self.state[p], "momentum_buffer", p)
            momentum.lerp_(p.grad, 1 - self.momentum)
            wanted = p.grad.lerp(momentum, self.momentum) if self.nesterov else momentum
            change = by_matrix(wanted, lambda x: orthogonalised(x, self.ns_steps, self.ns_dtype))
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(change, alpha=-group["lr"] * self._scale(*p.shape[-2:]))

    def _scale(self, rows: int, columns: int) -> float:
        if self.adjust_lr_fn == "original":
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))  # the root mean square of AdamW's updates is about 0.2

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] |= {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        averages, squares, steps = (
            [self.state[p][key] for p in parameters] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            averages,
            squares,
            [],
            steps,
            fused=can_fuse(parameters),
            amsgrad=False,
            beta1=self.adamw_betas[0],
            beta2=self.adamw_betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.adamw_eps,
            maximize=False,
        )


def orthogonalised(x: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """About U V' where x is U S V', by Newton-Schulz, of matrices [..., A, B]; in the type of x."""
    a, b, c = QUINTIC
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).to(dtype)  # the smaller side first, for smaller products
    y = (y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)).reshape(-1, *y.shape[-2:])
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    z: Tensor = y.mT if tall else y
    return z.reshape(x.shape).to(x.dtype)

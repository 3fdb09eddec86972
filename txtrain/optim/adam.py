"""Adam and AdamW: torch's own, fused where possible."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from txtrain.optim.groups import Groups

FUSED = {"cpu", "cuda"}  # devices for which torch has a fused Adam


def can_fuse(parameters: Iterable[Tensor]) -> bool:
    return all(p.device.type in FUSED and p.is_floating_point() for p in parameters)


def adamw(params: Groups, lr: float, betas: tuple[float, float], eps: float) -> Optimizer:
    """Adam with decoupled weight decay (1711.05101)."""
    return torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, fused=_fused(params))


def adam(params: Groups, lr: float, betas: tuple[float, float], eps: float) -> Optimizer:
    """Adam (1412.6980); weight decay, if any, is added to the gradient."""
    return torch.optim.Adam(params, lr=lr, betas=betas, eps=eps, fused=_fused(params))


def _fused(groups: Groups) -> bool:
    return can_fuse(p for group in groups for p in group["params"])

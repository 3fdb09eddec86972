"""The global norm of gradients that are sharded, over any meshes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def clip(parts: Sequence[tuple[Tensor, float]], max_norm: float | None, *groups: dist.ProcessGroup | None) -> Tensor:
    """Clip to a global norm of at most `max_norm`; the norm before that, 0-dimensional.

    Args:
        parts: this rank's part of each gradient, and the weight of its square: 1/n where n ranks hold the same part.
        groups: process groups over which the squared norms are summed, one after the other.
    """
    grads = [grad for grad, _ in parts]
    norms = torch.stack(torch._foreach_norm(grads)).double()
    total = (norms.square() * norms.new_tensor([share for _, share in parts])).sum()
    for group in filter(None, groups):
        dist.all_reduce(total, group=group)
    norm = total.sqrt().to(grads[0].dtype)
    if max_norm is not None:
        torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + 1e-6), max=1.0))  # as torch.nn.utils.clip_grad_norm_
    return norm

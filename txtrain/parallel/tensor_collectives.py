"""How activations pass between the ranks that share each layer's matrices, forward and backward.

Outside the blocks every rank holds the whole residual stream and its gradient. Between sublayers it holds some
positions; within a sublayer all positions, and its part of a sum as the gradient (1909.08053; 2205.05198).

                      forward                        backward
    split             all -> mine                    mine gathered
    join              mine gathered                  all -> mine
    enter             mine gathered                  parts summed, mine kept
    leave             parts summed, mine kept        mine gathered
    spread            unchanged                      parts summed
    summed            parts summed                   unchanged
    classes           mine gathered, last dimension  all -> mine

Zeros pad T positions to a multiple of the ranks; `join` and `enter` remove them, so they get no gradient.
"""

# B batch, T positions, P positions of one rank (the last ones may be padding), W ranks, D model size, V vocabulary

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def _all_gather(*args: Any, **kwargs: Any) -> None:
    """Renamed in torch 2.13. Looked up at each call, since `collective_timing` may have replaced it."""
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(*args, **kwargs)


def _reduce_scatter(*args: Any, **kwargs: Any) -> None:
    """As `_all_gather`."""
    (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(*args, **kwargs)


class Lanes:
    """The ranks of one dimension of a mesh; rank and size are of this dimension."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.group = mesh.get_group()
        self.rank, self.size = mesh.get_local_rank(), mesh.size()

    def split(self, x_BTD: Tensor) -> Tensor:
        return _Split.apply(x_BTD, self)  # type: ignore[no-any-return, no-untyped-call]

    def join(self, x_BPD: Tensor, length: int) -> Tensor:
        return _Join.apply(x_BPD, self, length)  # type: ignore[no-any-return, no-untyped-call]

    def enter(self, x_BPD: Tensor, length: int) -> Tensor:
        return _Enter.apply(x_BPD, self, length)  # type: ignore[no-any-return, no-untyped-call]

    def leave(self, x_BTD: Tensor) -> Tensor:
        return _Leave.apply(x_BTD, self)  # type: ignore[no-any-return, no-untyped-call]

    def spread(self, x: Tensor) -> Tensor:
        return _Spread.apply(x, self) if x.requires_grad else x  # type: ignore[no-untyped-call]

    def summed(self, x: Tensor) -> Tensor:
        return _Summed.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]

    def classes(self, x_BTv: Tensor, n: int) -> Tensor:
        return _Classes.apply(x_BTv, self, n)  # type: ignore[no-any-return, no-untyped-call]

    # Without a gradient:

    def mine(self, x_BTD: Tensor) -> Tensor:
        """This rank's positions, [B, P, D]."""
        return self.padded(x_BTD, 1).chunk(self.size, 1)[self.rank]

    def padded(self, x: Tensor, dim: int) -> Tensor:
        """With zeros at the end of a dimension, to a multiple of the ranks."""
        more = -x.shape[dim] % self.size
        return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, more)) if more else x

    def gathered(self, x_BPD: Tensor, length: int) -> Tensor:
        """The positions of all ranks, [B, T, D]."""
        all_BTD = self.stacked(x_BPD).movedim(0, 1).flatten(1, 2)
        return all_BTD if all_BTD.shape[1] == length else all_BTD[:, :length].contiguous()

    def reduced(self, x_BTD: Tensor) -> Tensor:
        """This rank's positions, summed over all ranks, [B, P, D]."""
        parts_WBPD = torch.stack(self.padded(x_BTD, 1).chunk(self.size, dim=1))
        out = torch.empty_like(parts_WBPD[0])
        _reduce_scatter(out, parts_WBPD.flatten(0, 1), group=self.group)
        return out

    def stacked(self, x: Tensor) -> Tensor:
        """The x of all ranks, [W, ...]."""
        out = x.new_empty(self.size, *x.shape)
        _all_gather(out.flatten(0, 1), x.contiguous(), group=self.group)
        return out

    def total(self, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=self.group)
        return x


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lanes: Lanes) -> Tensor:
        ctx.lanes, ctx.length = lanes, x.shape[1]
        return lanes.mine(x).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.lanes.gathered(grad, ctx.length), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lanes: Lanes, length: int) -> Tensor:
        ctx.lanes = lanes
        return lanes.gathered(x, length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.lanes.mine(grad).contiguous(), None, None


class _Enter(_Join):
    """The same forward; the ranks go on differently, so that their gradients are summed."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.lanes.reduced(grad), None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lanes: Lanes) -> Tensor:
        ctx.lanes, ctx.length = lanes, x.shape[1]
        return lanes.reduced(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.lanes.gathered(grad, ctx.length), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lanes: Lanes) -> Tensor:
        ctx.lanes = lanes
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.lanes.total(grad), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lanes: Lanes) -> Tensor:
        return lanes.total(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None


class _Classes(torch.autograd.Function):
    """Each rank holds n / W of n classes, rounded up; the last ones fewer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lanes: Lanes, n: int) -> Tensor:
        ctx.start, ctx.here = lanes.rank * -(-n // lanes.size), x.shape[-1]
        widest = F.pad(x, (0, -(-n // lanes.size) - x.shape[-1]))
        return lanes.stacked(widest).movedim(0, -2).flatten(-2)[..., :n]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad.narrow(-1, ctx.start, ctx.here), None, None

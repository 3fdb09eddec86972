"""Reductions over parameters that may be DTensors, sharded over ranks.

Sums are computed on this rank's shard and added up over the ranks that share the dimension; all else is arithmetic on
shards. DTensor's own operators take a dimension of size 1 for one to broadcast, and gather it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard


def local(x: Tensor) -> Tensor:
    """This rank's shard, in the same memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def summed(part: Tensor, like: Tensor, dim: int, of: int | None = None) -> Tensor:
    """The sum of a shard over its dimension `dim` (negative) and over ranks; that dimension is removed.

    Args:
        like: the tensor that the shard is of, or was of before dimensions were removed.
        of: the dimension's number in `like`, if another.
    """
    return _added_up(part.sum(dim), like, lambda p: _cuts(p, like.ndim + (of or dim)))


def root_mean_square(part: Tensor, like: Tensor) -> Tensor:
    """Over all values on all ranks; 0-dimensional."""
    return _added_up(part.square().sum(), like, lambda p: not p.is_replicate()).div(like.numel()).sqrt()


def kept_without(state: dict[str, Tensor], name: str, like: Tensor, dim: int) -> Tensor:
    """This rank's shard of a float32 state tensor: the parameter's shape without a dimension, sharded like it."""
    if name not in state:
        part = local(like).new_zeros(_without(local(like).shape, dim), dtype=torch.float32)
        if isinstance(like, DTensor):
            shape = torch.Size(_without(like.shape, dim))
            placements = [_placed(p, like.ndim + dim) for p in like.placements]
            stride = torch.empty(shape, device="meta").stride()
            state[name] = DTensor.from_local(
                part, like.device_mesh, placements, run_check=False, shape=shape, stride=stride
            )
        else:
            state[name] = part
    return local(state[name])


def by_matrix(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` applied to a whole matrix or a stack of whole ones; the result is sharded like `x`.

    Every rank computes the same whole matrix, bit for bit, however `x` is sharded. A stack (experts) is not gathered:
    each rank computes its own matrices; ranks that share matrices compute some of them each.
    """
    if not isinstance(x, DTensor):
        return function(x)
    within = [i for i, p in enumerate(x.placements) if not p.is_replicate() and not _cuts(p, 0)]
    if x.ndim == 3 and len(within) < 2:
        part = _some_of_a_stack(x, within[0], function) if within else function(x.to_local())
        return DTensor.from_local(
            part.contiguous(), x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
        )
    whole = function(x.full_tensor()).contiguous()
    return DTensor.from_local(whole, x.device_mesh, [Replicate()] * x.device_mesh.ndim, run_check=False).redistribute(
        placements=x.placements
    )


def _some_of_a_stack(x: DTensor, i: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """This rank's shard of `function` of each matrix, where they are sharded over dimension i of the mesh."""
    mesh = (
        x.device_mesh if x.device_mesh.ndim == 1
        else x.device_mesh[x.device_mesh.mesh_dim_names[i]]  # type: ignore[index]
    )
    part, dim = x.to_local(), x.placements[i].dim  # type: ignore[attr-defined]
    shape = torch.Size([*part.shape[:dim], x.shape[dim], *part.shape[dim + 1 :]])
    stride = torch.empty(shape, device="meta").stride()
    cut = DTensor.from_local(part, mesh, [x.placements[i]], run_check=False, shape=shape, stride=stride)
    some = cut.redistribute(placements=[Shard(0)])
    held = some.to_local()
    made = function(held).contiguous() if len(held) else held
    whole = DTensor.from_local(made, mesh, [Shard(0)], run_check=False, shape=some.shape, stride=some.stride())
    return whole.redistribute(placements=cut.placements).to_local()


def _added_up(part: Tensor, like: Tensor, cut: Callable[[Placement], bool]) -> Tensor:
    """Sum over each mesh dimension whose placement is `cut`. A shard that is empty is empty on its whole group."""
    if isinstance(like, DTensor) and part.numel():
        for i, placement in enumerate(like.placements):
            if cut(placement):
                dist.all_reduce(part, group=like.device_mesh.get_group(i))
    return part


def _cuts(placement: Placement, dim: int) -> bool:
    return getattr(placement, "dim", None) == dim  # also FSDP2's shards of tensor-parallel ones, which are no Shard


def _placed(placement: Placement, removed: int) -> Placement:
    """The placement after a dimension is removed."""
    if placement.is_replicate() or _cuts(placement, removed):
        return Replicate()
    dim: int = placement.dim  # type: ignore[attr-defined]
    return placement if dim < removed else Shard(dim - 1)


def _without(shape: torch.Size, dim: int) -> list[int]:
    sizes = list(shape)
    del sizes[dim]
    return sizes

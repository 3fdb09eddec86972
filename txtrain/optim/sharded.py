"""What looks at more than one value of a parameter, where the parameter may be a DTensor, cut over processes.

Sums are made of this process' part and added up over the processes between which the dimension is cut; the rest is arithmetic on
parts. DTensor's own operators will not do: they take a dimension of size 1 for one that is to be broadcast, and gather it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard


def local(x: Tensor) -> Tensor:
    """This process' part, in the same memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def summed(part: Tensor, like: Tensor, dim: int, of: int | None = None) -> Tensor:
    """The sum of a part over its dimension `dim` (negative) and over the processes; that dimension is left out.

    Args:
        like: what the part is a part of, or was before dimensions were left out.
        of: the dimension's number in `like`, where it is another one.
    """
    return _added_up(part.sum(dim), like, lambda p: _cuts(p, like.ndim + (of or dim)))


def root_mean_square(part: Tensor, like: Tensor) -> Tensor:
    """Over all values of all processes; 0-dimensional."""
    return _added_up(part.square().sum(), like, lambda p: not p.is_replicate()).div(like.numel()).sqrt()


def kept_without(state: dict[str, Tensor], name: str, like: Tensor, dim: int) -> Tensor:
    """This process' part of a parameter's state, float32, of its shape without a dimension; cut as the parameter is along the others."""
    if name not in state:
        part = local(like).new_zeros(_without(local(like).shape, dim), dtype=torch.float32)
        if isinstance(like, DTensor):
            shape = torch.Size(_without(like.shape, dim))
            placements = [_placed(p, like.ndim + dim) for p in like.placements]
            stride = torch.empty(shape, device="meta").stride()
            state[name] = DTensor.from_local(part, like.device_mesh, placements, run_check=False, shape=shape, stride=stride)
        else:
            state[name] = part
    return local(state[name])


def by_matrix(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function of a whole matrix, or of a stack of whole ones; cut as `x` is.

    Every process computes the whole matrix: the same one, bit for bit, wherever `x` is cut. A stack (experts) is not gathered: each process
    computes those of its matrices that it has; where they are cut, the processes that share some compute some of them each.
    """
    if not isinstance(x, DTensor):
        return function(x)
    within = [i for i, p in enumerate(x.placements) if not p.is_replicate() and not _cuts(p, 0)]
    if x.ndim == 3 and len(within) < 2:
        part = _some_of_a_stack(x, within[0], function) if within else function(x.to_local())
        return DTensor.from_local(part.contiguous(), x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())
    whole = function(x.full_tensor()).contiguous()
    return DTensor.from_local(whole, x.device_mesh, [Replicate()] * x.device_mesh.ndim, run_check=False).redistribute(placements=x.placements)


def _some_of_a_stack(x: DTensor, i: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """This process' part of function of each matrix, where they are cut over dimension i of the mesh."""
    mesh = x.device_mesh if x.device_mesh.ndim == 1 else x.device_mesh[x.device_mesh.mesh_dim_names[i]]  # type: ignore[index]
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
    """Over each dimension of the mesh along which the parameter is cut so. Where a part is empty, it is so in the whole group."""
    if isinstance(like, DTensor) and part.numel():
        for i, placement in enumerate(like.placements):
            if cut(placement):
                dist.all_reduce(part, group=like.device_mesh.get_group(i))
    return part


def _cuts(placement: Placement, dim: int) -> bool:
    return getattr(placement, "dim", None) == dim  # also FSDP2's cut of what tensor parallelism has cut, which is no Shard


def _placed(placement: Placement, removed: int) -> Placement:
    """Where a dimension is left out."""
    if placement.is_replicate() or _cuts(placement, removed):
        return Replicate()
    dim: int = placement.dim  # type: ignore[attr-defined]
    return placement if dim < removed else Shard(dim - 1)


def _without(shape: torch.Size, dim: int) -> list[int]:
    sizes = list(shape)
    del sizes[dim]
    return sizes

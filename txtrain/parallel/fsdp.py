"""FSDP2 by block, applied from outside, and initialisation whose values do not depend on the sharding."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from txtrain.model.block import Block
from txtrain.model.ffn.moe import Experts
from txtrain.model.init import Initialiser, to_initialise
from txtrain.parallel.dtensor_parts import indices


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    compute: torch.dtype | None,
    reshard_after_forward: bool,
    cpu_offload: bool,
    mesh_of_experts: DeviceMesh | None = None,
    keep_root: bool = True,
) -> None:
    """Gather each block while it computes; parameters outside blocks (embedding, last norm, head) belong to the root.

    Args:
        mesh: one dimension (shards), or two (replicas, shards).
        compute: dtype in which parameters are gathered and multiplied, beside float32 shards; gradients are then summed
            in float32. None: the parameters' own.
        mesh_of_experts: with expert parallelism, the smaller mesh over which this rank's experts are sharded; they are
            gathered apart from their block.
        keep_root: keep the root's parameters gathered after a forward: in training the backward needs them at once.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32 if compute else None, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
    how: dict[str, Any] = {
        "mp_policy": policy, "offload_policy": offload, "shard_placement_fn": Along(model, mesh_of_experts or mesh)
    }
    # Inner modules come first.
    parts: tuple[tuple[type, DeviceMesh | None], ...] = ((Experts, mesh_of_experts), (Block, mesh))
    for kind, its_mesh in parts:
        for module in model.modules():
            if isinstance(module, kind) and its_mesh is not None:
                fully_shard(module, mesh=its_mesh, reshard_after_forward=reshard_after_forward, **how)
    fully_shard(model, mesh=mesh, reshard_after_forward=not keep_root, **how)
    for part in sharded(model):
        # Sums, not means: the loss is already divided by the number of targets of the global batch.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


class Along:
    """The dimension along which a parameter is sharded: rows, padded on the last ranks.

    Stacked experts are sharded along the first dimension that the number of shards divides, if any: with more shards
    than experts, rows would be mostly padding.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """mesh: of the experts; its last dimension is the shards."""
        self._n = mesh.size(mesh.ndim - 1)
        self._stacked = {
            id(m._parameters[name]) for m in model.modules() if isinstance(m, Experts) for name in m.stacked_projections
        }

    def __call__(self, parameter: nn.Parameter) -> Shard | None:
        if id(parameter) not in self._stacked:
            return None
        held = getattr(parameter, "_local_tensor", parameter)
        # Dimensions that tensor parallelism has cut.
        taken = {getattr(placement, "dim", None) for placement in getattr(parameter, "placements", ())} - {0}
        return next(
            (Shard(dim) for dim, size in enumerate(held.shape) if size % self._n == 0 and dim not in taken), None
        )


def sharded(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


@torch.no_grad()
def init_sharded(model: nn.Module, device: torch.device, loaded: Container[str] = ()) -> None:
    """The values of `init_weights`; each rank keeps its shards. One module or expert matrix exists whole at a time."""
    unset = to_initialise(model, loaded)
    if not unset:
        return
    initialiser = Initialiser(model)
    for name, module in unset.items():
        parts: dict[str, Any] = {key: p for key, p in module._parameters.items() if isinstance(p, DTensor)}
        if isinstance(module, Experts) and parts:
            for key in module.stacked_projections:
                initialiser.fill_stacked(name, module, key, _one_by_one(parts[key], device))
            continue
        for key, part in parts.items():
            module._parameters[key] = nn.Parameter(
                torch.empty(part.shape, dtype=part.dtype, device=device), requires_grad=part.requires_grad
            )
        initialiser.fill(name, module)
        for key, part in parts.items():
            made: Any = module._parameters[key]
            module._parameters[key] = part
            local = distribute_tensor(
                made.to(part.device_mesh.device_type), part.device_mesh, part.placements, src_data_rank=None
            ).to_local()
            part.to_local().copy_(local)


def _one_by_one(stack: DTensor, device: torch.device) -> Iterator[Tensor]:
    """Yield each matrix of a stack for the caller to fill, then copy this rank's part of it into the stack."""
    rows, *within = (indices(stack, dim) for dim in range(stack.ndim))
    places = {row: i for i, row in enumerate(rows.tolist())}
    matrix = torch.empty(stack.shape[1:], dtype=stack.dtype, device=device)
    for i in range(stack.shape[0]):
        yield matrix
        if i in places:
            part = matrix
            for dim, index in enumerate(within):
                part = part if len(index) == part.shape[dim] else part.index_select(dim, index.to(device))
            stack.to_local()[places[i]].copy_(part)

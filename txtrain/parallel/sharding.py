"""FSDP2 by block, applied from outside; and initial values that do not depend on who holds which part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from txtrain.model.block import Block
from txtrain.model.init import Initialiser


def shard(model: nn.Module, mesh: DeviceMesh, compute: torch.dtype | None, reshard_after_forward: bool, cpu_offload: bool) -> None:
    """Each block is gathered while it computes; what is outside the blocks (embedding, last norm, head) belongs to the root.

    mesh: of one dimension (shards), or of two (copies, shards).
    compute: what parameters are gathered and multiplied in, beside float32 shards; None: as they are. Gradients are summed in float32.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if compute else None, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard_after_forward)
    # The root's parameters are needed again as soon as the backward begins: they stay.
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    for part in sharded(model):
        part.set_gradient_divide_factor(1.0)  # sums, not means: the loss is divided by the targets of the whole global batch
        part.set_force_sum_reduction_for_comms(True)


def sharded(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


@torch.no_grad()
def init_sharded(model: nn.Module, device: torch.device) -> None:
    """The values of `init_weights`, each process keeping its parts; of one module at a time there is a whole copy."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    initialiser = Initialiser(model)
    for name, module in model.named_modules():
        parts: dict[str, Any] = {key: p for key, p in module._parameters.items() if isinstance(p, DTensor)}
        for key, part in parts.items():
            module._parameters[key] = nn.Parameter(torch.empty(part.shape, dtype=part.dtype, device=device), requires_grad=part.requires_grad)
        initialiser.fill(name, module)
        for key, part in parts.items():
            made: Any = module._parameters[key]
            module._parameters[key] = part
            local = distribute_tensor(made.to(part.device_mesh.device_type), part.device_mesh, part.placements, src_data_rank=None).to_local()
            part.to_local().copy_(local)

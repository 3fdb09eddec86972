"""Expert parallelism, applied from outside to what a component declares as experts (`txtrain.registry.Cut`):
each rank has whole experts, and tokens travel to them (2006.16668).

`Experts.forward` takes rows in the order of the experts and how many there are for each. Around it rows go to the processes that have
their experts, and what these make of them comes back; the router, the weights and the sum stay where the token is. A parameter becomes a
DTensor cut between experts, which its module reads as this process' part, as in tensor_parallel.py.

The processes that share experts also see different samples: gradients of an expert come back with the rows of all of them.
"""

# R rows of this process (a token once for each expert it visits), S rows that came here, D model size, E experts, L experts of one process,
# W processes

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from txtrain.parallel.dtensor_parts import place, wrap
from txtrain.registry import cut_of


def divide(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give each process of a mesh of one dimension its experts of every mixture, in place; on the meta device, or with the same values in each."""
    config: Any = model.config
    exchange, how = Exchange(mesh.get_group()), cut_of("ffn", config.ffn)
    children: list[tuple[str, Any]] = [child for module in model.modules() for child in module.named_children()]
    for name, module in children:
        if how.get(name) == "experts":
            place(module, mesh, **dict.fromkeys(module.stacked_projections, Shard(0)))
            wrap(module, "forward", exchange.through)


class Exchange:
    """Rows to the processes that have their experts, and back."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, group.size()

    @partial(torch.compiler.disable, recursive=False)  # what it calls is compiled: this waits to know how many rows come
    def through(self, experts: Callable[[Tensor, Tensor], Tensor], x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """experts(x, counts), of which `experts` has only this process'."""
        theirs_WL = counts_E.view(self.size, -1)
        mine_WL = torch.empty_like(theirs_WL)
        dist.all_to_all_single(mine_WL, theirs_WL.contiguous(), group=self.group)
        sent, came = torch.stack((theirs_WL.sum(1), mine_WL.sum(1))).tolist()
        x_SD = _Exchanged.apply(x_RD, self.group, sent, came)  # type: ignore[no-untyped-call]
        y_SD = together(experts, x_SD, mine_WL) if torch.is_grad_enabled() else one_by_one(experts, x_SD.split(came), mine_WL)
        return _Exchanged.apply(y_SD, self.group, came, sent)  # type: ignore[no-any-return, no-untyped-call]


def together(experts: Callable[[Tensor, Tensor], Tensor], x_SD: Tensor, counts_WL: Tensor) -> Tensor:
    """Rows in the order of processes, and of experts within: each expert computes those of all processes at once."""
    order_S = by_expert(counts_WL, len(x_SD))
    y_SD = experts(x_SD.index_select(0, order_S), counts_WL.sum(0))
    return y_SD.index_select(0, order_S.argsort())


def one_by_one(experts: Callable[[Tensor, Tensor], Tensor], parts: Sequence[Tensor], counts_WL: Tensor) -> Tensor:
    """The same, the rows of each process by themselves.

    Processes that generate the same text must get the same bits, or one might stop while another waits for it; and how a row is rounded may
    depend on where it lies among others.
    """
    return torch.cat([experts(part_SD, counts_L) for part_SD, counts_L in zip(parts, counts_WL, strict=True)])


def by_expert(counts_WL: Tensor, n: int) -> Tensor:
    """The order in which n rows, which lie by process and within it by expert, lie by expert and within it by process."""
    W, L = counts_WL.shape
    expert_WL = torch.arange(L, device=counts_WL.device).expand(W, L)
    return expert_WL.flatten().repeat_interleave(counts_WL.flatten(), output_size=n).argsort(stable=True)


class _Exchanged(torch.autograd.Function):
    """Rows for each process in turn, `sent` of them, become those from each, `came` of them; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, sent: list[int], came: list[int]) -> Tensor:
        ctx.group, ctx.sent, ctx.came = group, sent, came
        out = x.new_empty(sum(came), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), came, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Exchanged.apply(grad, ctx.group, ctx.came, ctx.sent), None, None, None  # type: ignore[no-untyped-call]

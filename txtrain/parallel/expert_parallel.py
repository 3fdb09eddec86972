"""Expert parallelism, applied from outside to what a component declares as experts (`txtrain.registry.Cut`):
each rank has whole experts, and tokens are sent to them (2006.16668).

`Experts.forward` takes rows in the order of the experts, and their number for each. Around it rows are sent to the
ranks that have their experts, and the results come back; router, weights and sum stay on the token's rank. A parameter
becomes a DTensor sharded by experts, of which the module reads this rank's part, as in tensor_parallel.py.

The ranks that share experts also see different samples: an expert's gradient includes the rows of all of them.
"""

# R rows of this rank (a token once per expert it visits), S rows received, D model size, E experts,
# L experts of one rank, W ranks

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
    """Give each rank of a one-dimensional mesh its experts of every mixture, in place.

    The model is on the meta device, or has equal values on all ranks.
    """
    config: Any = model.config
    exchange, how = Exchange(mesh.get_group()), cut_of("ffn", config.ffn)
    children: list[tuple[str, Any]] = [child for module in model.modules() for child in module.named_children()]
    for name, module in children:
        if how.get(name) == "experts":
            place(module, mesh, **dict.fromkeys(module.stacked_projections, Shard(0)))
            wrap(module, "forward", exchange.through)


class Exchange:
    """Sends rows to the ranks that have their experts, and back."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, group.size()

    @partial(torch.compiler.disable, recursive=False)  # only its callees are compiled: this waits for the counts
    def through(self, experts: Callable[[Tensor, Tensor], Tensor], x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """experts(x, counts) over the experts of all ranks; `experts` has this rank's."""
        theirs_WL = counts_E.view(self.size, -1)
        mine_WL = torch.empty_like(theirs_WL)
        dist.all_to_all_single(mine_WL, theirs_WL.contiguous(), group=self.group)
        sent, came = torch.stack((theirs_WL.sum(1), mine_WL.sum(1))).tolist()
        x_SD = _Exchanged.apply(x_RD, self.group, sent, came)  # type: ignore[no-untyped-call]
        if torch.is_grad_enabled():
            y_SD = together(experts, x_SD, mine_WL)
        else:
            y_SD = one_by_one(experts, x_SD.split(came), mine_WL)
        return _Exchanged.apply(y_SD, self.group, came, sent)  # type: ignore[no-any-return, no-untyped-call]


def together(experts: Callable[[Tensor, Tensor], Tensor], x_SD: Tensor, counts_WL: Tensor) -> Tensor:
    """Rows ordered by rank, then by expert; each expert computes those of all ranks at once."""
    order_S = by_expert(counts_WL, len(x_SD))
    y_SD = experts(x_SD.index_select(0, order_S), counts_WL.sum(0))
    return y_SD.index_select(0, order_S.argsort())


def one_by_one(experts: Callable[[Tensor, Tensor], Tensor], parts: Sequence[Tensor], counts_WL: Tensor) -> Tensor:
    """The same, the rows of each rank separately.

    Ranks that generate the same text must get the same bits, or one might stop while another waits; a row's rounding
    may depend on its place among others.
    """
    return torch.cat([experts(part_SD, counts_L) for part_SD, counts_L in zip(parts, counts_WL, strict=True)])


def by_expert(counts_WL: Tensor, n: int) -> Tensor:
    """The permutation of n rows from (rank, expert) order to (expert, rank) order."""
    W, L = counts_WL.shape
    expert_WL = torch.arange(L, device=counts_WL.device).expand(W, L)
    return expert_WL.flatten().repeat_interleave(counts_WL.flatten(), output_size=n).argsort(stable=True)


class _Exchanged(torch.autograd.Function):
    """Sends `sent` rows to each rank and receives `came` rows from each; gradients go back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, sent: list[int], came: list[int]) -> Tensor:
        ctx.group, ctx.sent, ctx.came = group, sent, came
        out = x.new_empty(sum(came), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), came, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Exchanged.apply(grad, ctx.group, ctx.came, ctx.sent), None, None, None  # type: ignore[no-untyped-call]

"""Modules that read their rank's part of their parameters, and a vocabulary of which some rows are here."""

# V vocabulary, D model size, C tokens of a chunk, W ranks

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor

from txtrain.hf.pieces import Held
from txtrain.model.head.loss import Vocabulary
from txtrain.parallel.tensor_collectives import Lanes


def own_parameters(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in module._parameters.items() if p is not None]


ROWS = "_rows_read"  # attribute: the rows of its parameters that a module reads, if not all


@lru_cache
def reading(cls: type, names: tuple[str, ...]) -> type:
    """The class with properties that read this rank's part of these parameters; the registered parameters stay."""
    properties = {name: property(partial(_read, name=name)) for name in names}
    return type(cls.__name__, (cls,), properties | {"__module__": cls.__module__})


def _read(module: nn.Module, name: str) -> Any:
    parameter: Any = module._parameters[name]
    if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim > 1:  # two dimensions: FSDP itself reads it
        return parameter
    # A replicated gradient may be a part of a sum: `Cut.replicated`.
    part = parameter.to_local(grad_placements=parameter.placements)
    rows = module.__dict__.get(ROWS)
    return part if rows is None else part[rows]


def place(owner: nn.Module, mesh: DeviceMesh, **placements: Placement) -> None:
    """Distribute parameters of a module over a one-dimensional mesh; the module then reads this rank's part of them."""
    if not placements:
        return
    for name, placement in placements.items():
        parameter = owner._parameters.get(name)
        if parameter is None:
            continue
        placed = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
        owner._parameters[name] = nn.Parameter(placed, requires_grad=parameter.requires_grad)
    cls: Any = type(owner)
    owner.__class__ = reading(cls, tuple(name for name, _ in own_parameters(owner)))


def indices(whole: DTensor, dim: int) -> Tensor:
    """This rank's indices along a dimension."""
    cuts = [p if getattr(p, "dim", None) == dim else Replicate() for p in whole.placements]
    index = torch.arange(whole.shape[dim], device=whole.device_mesh.device_type)
    spread = index.view([-1 if d == dim else 1 for d in range(whole.ndim)])
    return distribute_tensor(spread, whole.device_mesh, cuts, src_data_rank=None).to_local().flatten()


def held(tensor: Tensor) -> Held:
    """This rank's part of a tensor, which may be sharded."""
    if not isinstance(tensor, DTensor):
        return Held.whole(tensor)
    return Held(tensor.to_local(), tuple(indices(tensor, dim).cpu() for dim in range(tensor.ndim)))


def wrap(module: nn.Module, method: str, around: Callable[..., Any], *given: Any) -> None:
    """Replace the method by `around(*given, method, ...)`."""
    setattr(module, method, partial(around, *given, getattr(module, method)))


class VocabularyPart(Vocabulary):
    """Some rows here, the rest on the other ranks, which exchange their results for a chunk at once."""

    def __init__(self, lanes: Lanes, vocab_size: int) -> None:
        self.lanes, self.vocab_size = lanes, vocab_size

    def rows_per_chunk(self, weight_VD: Tensor) -> int:
        """Equal on all ranks, since they meet at every chunk."""
        return super().rows_per_chunk(weight_VD.new_empty(-(-self.vocab_size // self.lanes.size), 0))

    def n_words(self, weight_VD: Tensor) -> int:
        return self.vocab_size

    def find(self, targets_C: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
        return rows_here(targets_C, self.lanes, self.vocab_size, n_rows)

    def log_z_and_target(self, logits_CV: Tensor, rows_C: Tensor, is_here_C: Tensor) -> tuple[Tensor, Tensor]:
        both_2C = torch.stack(super().log_z_and_target(logits_CV, rows_C, is_here_C))
        log_z_WC, target_WC = self.lanes.stacked(both_2C).unbind(1)
        return log_z_WC.logsumexp(0), target_WC.sum(0)

    def log_z(self, logits_CV: Tensor) -> Tensor:
        return self.lanes.stacked(super().log_z(logits_CV)).logsumexp(0)

    def total(self, values_CV: Tensor) -> Tensor:
        return self.lanes.stacked(super().total(values_CV)).sum(0)


def rows_here(ids: Tensor, lanes: Lanes, n: int, n_here: int) -> tuple[Tensor, Tensor]:
    """The row of each id among this rank's rows of n (0 if it is not here), and whether it is here."""
    rows = ids - lanes.rank * -(-n // lanes.size)
    is_here = (rows >= 0) & (rows < n_here)
    return rows.masked_fill(~is_here, 0), is_here

"""LoRA (Hu et al. 2021, 2106.09685): W x + scaling * B (A x), with W frozen; applied from outside, to any linear layer.

A module keeps its class's place, names and parameters, and gets two factors. B starts at 0, so that training starts
from the base. scaling: lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA, 2312.03732).
"""

# I inputs, O outputs, R rank, E experts, N rows

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txtrain.model.adapter import factor_of
from txtrain.model.ffn.moe import Experts, grouped_linear
from txtrain.model.transformer import Transformer


class Pair(NamedTuple):
    """An adapter's factors for one matrix: A [R, I] and B [O, R]; for experts [E, R, I] and [E, O, R]."""

    A: Tensor
    B: Tensor
    scaling: float

    def added_to(self, weight: Tensor, box: tuple[slice, ...] = ()) -> Tensor:
        """The merged weight, in its dtype. box: the part of the matrix that `weight` is; empty: all of it."""
        if not weight.is_floating_point():
            return weight
        *experts, rows, columns = box or (slice(None),) * weight.ndim
        A, B = self.A[(*experts, slice(None), columns)], self.B[(*experts, rows)]
        return (weight.float() + self.scaling * (B.float() @ A.float()).to(weight.device)).to(weight.dtype)


class Factor(nn.Module):
    """One of the two matrices."""

    def __init__(self, rows: int, columns: int, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter. Its dropout is on the adapter's input alone."""

    lora_A: Factor
    lora_B: Factor
    lora_dropout: nn.Dropout
    scaling: float

    def forward(self, x_NI: Tensor) -> Tensor:
        return F.linear(x_NI, self.weight, self.bias) + self.addition(x_NI)

    def addition(self, x_NI: Tensor) -> Tensor:
        """What the adapter adds to the layer's output."""
        added: Tensor = self.lora_B(self.lora_A(self.lora_dropout(x_NI)) * self.scaling)
        return added


class AdaptedExperts(Experts):
    """Experts with an adapter of their own each, for some of their matrices."""

    scalings: dict[str, float]  # by the name of the matrix

    def product(self, x_NI: Tensor, name: str, counts_E: Tensor) -> Tensor:
        y_NO = super().product(x_NI, name, counts_E)
        if name not in self.scalings:
            return y_NO
        h_NR = grouped_linear(x_NI, getattr(self, f"{name}_lora_A"), counts_E) * self.scalings[name]
        return y_NO + grouped_linear(h_NR, getattr(self, f"{name}_lora_B"), counts_E)


def product(linear: nn.Linear, x: Tensor) -> Tensor:
    """x times the layer's matrix, with what an adapter adds, without the bias."""
    y = F.linear(x, linear.weight)
    return y + linear.addition(x) if isinstance(linear, AdaptedLinear) else y


def matrix(linear: nn.Linear) -> Tensor:
    """The layer's matrix with its adapter's product added, for what reads it instead of calling the layer."""
    if not isinstance(linear, AdaptedLinear):
        return linear.weight
    return linear.weight + linear.scaling * (linear.lora_B.weight @ linear.lora_A.weight)


# ----------------------------------------------------------------------------------------------------- to a whole model


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """What can be adapted, by the matrix' name, and the module that owns it: layers of torch.nn.Linear itself (others
    may read their weight in their own way), and stacked experts."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            found[name] = module
        elif type(module) is Experts:
            found |= {f"{name}.{child}": module for child in Experts.stacked_projections}
    return found


def attach(
    model: nn.Module, ranks: Mapping[str, tuple[int, float]], dropout: float = 0.0, whole: Iterable[str] = ()
) -> None:
    """Give matrices their factors, in place: on the meta device without values, else initialised.

    ranks: rank and scaling, by the name of the matrix. whole: tensors that are saved with them.
    """
    known = matrices(model)
    for name, (r, scaling) in ranks.items():
        module: Any = known[name]
        is_linear: bool = isinstance(module, nn.Linear)
        if is_linear:
            module.__class__ = AdaptedLinear
            module.scaling, module.lora_dropout = scaling, nn.Dropout(dropout)
            module.lora_A = Factor(r, module.in_features, module.weight)
            module.lora_B = Factor(module.out_features, r, module.weight)
            continue
        child = name.rpartition(".")[2]
        if not isinstance(module, AdaptedExperts):
            module.__class__, module.scalings = AdaptedExperts, {}
        module.scalings[child] = scaling
        weight = module._parameters[child]
        experts, outputs, inputs = weight.shape
        for kind, shape in (("A", (r, inputs)), ("B", (outputs, r))):
            made = torch.empty(experts, *shape, dtype=weight.dtype, device=weight.device)
            setattr(module, f"{child}_lora_{kind}", nn.Parameter(made))
            module.stacked_projections = (*module.stacked_projections, f"{child}_lora_{kind}")
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and (factor := factor_of(name)) is not None and factor.matrix in ranks:
            for weight in parameter.data if factor.stacked else [parameter.data]:
                fill_factor(weight, name)
    if isinstance(model, Transformer):
        model.kept = frozenset((*whole, *filter(factor_of, model.state_dict())))


def fill_factor(weight: Tensor, name: str, generator: torch.Generator | None = None) -> None:
    """PEFT's initial values of one factor: A uniform within 1 / sqrt(inputs), B zero. name: of the parameter."""
    factor = factor_of(name)
    assert factor is not None
    if factor.kind == "B":
        nn.init.zeros_(weight)
    else:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


def kept(model: nn.Module) -> dict[str, Tensor]:
    """Of a model's parameters and buffers, by name, those that its checkpoint holds."""
    only = model.kept if isinstance(model, Transformer) else None
    return {name: tensor for name, tensor in model.state_dict().items() if only is None or name in only}


def pairs(tensors: Mapping[str, Tensor], scaling: Mapping[str, float] | float) -> dict[str, Pair]:
    """The adapter in tensors of these names, by matrix. scaling: of all, or by matrix."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (factor := factor_of(name)) is not None:
            found.setdefault(factor.matrix, {})[factor.kind] = tensor
    return {
        name: Pair(both["A"], both["B"], scaling[name] if isinstance(scaling, Mapping) else scaling)
        for name, both in found.items()
    }


def adapter_of(model: nn.Module) -> dict[str, Pair]:
    """A model's adapter; empty if it has none."""
    scalings: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            scalings[name] = module.scaling
        elif isinstance(module, AdaptedExperts):
            scalings |= {f"{name}.{child}": scaling for child, scaling in module.scalings.items()}
    return pairs(model.state_dict(), scalings) if scalings else {}


@torch.no_grad()
def merged(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and persistent buffers by name, its adapter merged into copies of the matrices."""
    tensors, adapter = model.state_dict(), adapter_of(model)
    found = {name: tensor for name, tensor in tensors.items() if factor_of(name) is None}
    for name, pair in adapter.items():
        own = name if name in found else f"{name}.weight"
        found[own] = pair.added_to(found[own])
    return found

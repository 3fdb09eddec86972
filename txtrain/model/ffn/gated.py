"""act(gate) * up as one node of autograd, which keeps its two inputs and computes the activation again in the backward.

So a gated FFN keeps two tensors of its hidden size instead of three, and of those between them only parts exist.
Values and gradients are to the last digit those of the plain formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from txtrain.model.trace.tape import CACHED_ELEMENTS

Activation = Callable[[Tensor], Tensor]

gelu_gradient = torch.ops.aten.gelu_backward.grad_input
GRADIENTS: dict[Activation, Callable[..., Tensor]] = {  # of those for which torch has a kernel
    F.silu: torch.ops.aten.silu_backward.grad_input, F.gelu: partial(gelu_gradient, approximate="none"),
}


def gated(act: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up, elementwise."""
    wanted = torch.is_grad_enabled() and gate.requires_grad and up.requires_grad
    fits = gate.dtype == up.dtype and gate.is_contiguous()  # torch computes GELU of others by another kernel
    if not wanted or not fits or act not in GRADIENTS or torch.compiler.is_compiling():
        return act(gate) * up
    out: Tensor = _Gated.apply(gate, up, act)
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        out = _like(gate)
        for g, u, y in _parts(gate, up, out):
            torch.mul(act(g), u, out=y)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = _like(gate), _like(up)
        for given, g, u, of_g, of_u in _parts(gradient, gate, up, of_gate, of_up):
            torch.mul(given, ctx.act(g), out=of_u)
            GRADIENTS[ctx.act](given * u, g, grad_input=of_g)
        return of_gate, of_up, None


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same elements of each; on the CPU so few that they stay in a core's cache."""
    size = CACHED_ELEMENTS if tensors[0].device.type == "cpu" else max(1, tensors[0].numel())
    return zip(*(x.flatten().split(size) for x in tensors), strict=True)

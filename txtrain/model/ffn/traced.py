"""torch's grouped product for torch.compile, which does not know it in float32: one operation of ours, not looked into.

Without it a compiled mixture reads its counts, which breaks the graph.
"""

# R rows, E experts, O out, I in

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("txtrain::grouped_mm", mutates_args=())
def grouped_mm(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Rows times their expert's matrix, [R, O]. ends: where each expert's rows end, int32."""
    return F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=ends_E)


@torch.library.custom_op("txtrain::grouped_outer", mutates_args=())
def grouped_outer(y_RO: Tensor, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    """The gradient of the matrices, [E, O, I], from that of the product."""
    return F.grouped_mm(y_RO.t(), x_RI, offs=ends_E)


@grouped_mm.register_fake
def _(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])


@grouped_outer.register_fake
def _(y_RO: Tensor, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    return y_RO.new_empty(ends_E.shape[0], y_RO.shape[1], x_RI.shape[1])


def _backward(ctx: Any, y_RO: Tensor) -> tuple[Tensor, Tensor, None]:
    x_RI, weight_EOI, ends_E = ctx.saved_tensors
    y_RO = y_RO.contiguous()
    return grouped_mm(y_RO, weight_EOI.transpose(1, 2), ends_E), grouped_outer(y_RO, x_RI, ends_E), None


grouped_mm.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

"""Cross-entropy of the head's logits, by chunks of tokens: all logits are never held at once."""

# N tokens (batch and positions flattened), C tokens of one chunk, D model size, V vocabulary

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from txtrain.model.trace.tape import CHUNK_ELEMENTS

IGNORED = -100  # a label that is no target, as in torch and Hugging Face


class Vocabulary:
    """Which rows of the output matrix are here: all of them, unless the matrix lies in parts somewhere else too."""

    def rows_per_chunk(self, weight_VD: Tensor) -> int:
        """Tokens whose logits are held at a time."""
        return max(1, CHUNK_ELEMENTS // weight_VD.shape[0])

    def find(self, targets_C: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
        """The row of each target here, and whether it is here."""
        is_target_C = targets_C != IGNORED
        return targets_C.masked_fill(~is_target_C, 0), is_target_C

    def log_z_and_target(self, logits_CV: Tensor, rows_C: Tensor, is_here_C: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of the softmax' denominator, and the target's logit, both over the whole vocabulary: [C]."""
        return logits_CV.logsumexp(-1), logits_CV.gather(1, rows_C[:, None]).squeeze(1) * is_here_C


def shifted(labels_BT: Tensor) -> Tensor:
    """Targets of a causal model: position t predicts label t + 1; the last predicts nothing."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def cross_entropy(logits: Tensor, targets: Tensor, denominator: Tensor) -> Tensor:
    """Sum over the targets, in float32, divided by the denominator (targets of the global batch)."""
    total = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / denominator


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(cap(x W^T + b))[target] / denominator, by chunks of tokens.

    The gradient is made in the forward, where a chunk's logits still exist: the backward only scales it. So the largest temporary
    is a chunk, not [N, V], and the logits are computed once (recomputing them in the backward would cost a third more).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        denominator: Tensor,
        softcap: float | None,
        vocabulary: Vocabulary,
        with_grad: bool,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        need_x, need_weight, need_bias = (with_grad and need for need in ctx.needs_input_grad[:3])
        grad_x = torch.empty_like(x_ND) if need_x else None
        grad_weight = torch.zeros_like(weight_VD) if need_weight else None
        grad_bias = torch.zeros_like(weight_VD[:, 0], dtype=torch.float32) if need_bias else None
        total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        size = vocabulary.rows_per_chunk(weight_VD)
        for start in range(0, x_ND.shape[0], size):
            rows = slice(start, start + size)
            loss, grad_CV = _chunk(x_ND[rows], weight_VD, bias_V, targets_N[rows], softcap, vocabulary, need_x or need_weight or need_bias)
            total += loss
            if grad_CV is None:
                continue
            grad_CV = grad_CV / denominator
            if grad_bias is not None:
                grad_bias += grad_CV.sum(0)
            grad_CV = grad_CV.to(x_ND.dtype)
            if grad_x is not None:
                grad_x[rows] = grad_CV @ weight_VD
            if grad_weight is not None:
                grad_weight.addmm_(grad_CV.T, x_ND[rows])
        ctx.save_for_backward(grad_x, grad_weight, None if bias_V is None or grad_bias is None else grad_bias.to(bias_V.dtype))
        return total / denominator

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        scaled = (None if g is None or grad is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None)


def _chunk(
    x_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_C: Tensor, softcap: float | None, vocabulary: Vocabulary, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed loss of a chunk, and its gradient by the logits before the cap, both in float32."""
    logits_CV = F.linear(x_CD, weight_VD, bias_V).float()
    if softcap is not None:
        logits_CV = logits_CV.div_(softcap).tanh_().mul_(softcap)
    is_target_C = targets_C != IGNORED
    rows_C, is_here_C = vocabulary.find(targets_C, weight_VD.shape[0])
    log_z_C, target_C = vocabulary.log_z_and_target(logits_CV, rows_C, is_here_C)
    loss = ((log_z_C - target_C) * is_target_C).sum()
    if not with_grad:
        return loss, None
    slope_CV = None if softcap is None else 1 - (logits_CV / softcap).square()
    grad_CV = logits_CV.sub_(log_z_C[:, None]).exp_()
    grad_CV.scatter_add_(1, rows_C[:, None], -is_here_C[:, None].to(grad_CV.dtype))
    grad_CV.mul_(is_target_C[:, None])
    return loss, grad_CV if slope_CV is None else grad_CV.mul_(slope_CV)

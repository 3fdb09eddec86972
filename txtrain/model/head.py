"""What leaves the last block: logits, and the loss that never holds all of them."""

# N tokens (batch and positions flattened), C tokens of one chunk, D model size, V vocabulary

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORED = -100  # a label that is no target, as in torch and Hugging Face
CHUNK_ELEMENTS = 1 << 22  # logits held at a time, where the caller does not want them


class LMHead(nn.Module):
    """Logits over the vocabulary; softcap * tanh(logits / softcap) where set (Gemma 2). A tied head owns no parameter."""

    def __init__(self, dim: int, vocab_size: int, tied: bool, softcap: float | None) -> None:
        super().__init__()
        self.softcap = softcap
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, dim))

    def output_weight(self, embedding_VD: Tensor) -> Tensor:
        return embedding_VD if self.weight is None else self.weight

    def forward(self, x_BTD: Tensor, embedding_VD: Tensor) -> Tensor:
        logits = F.linear(x_BTD, self.output_weight(embedding_VD))
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def loss(self, x_BTD: Tensor, embedding_VD: Tensor, targets_BT: Tensor, denominator: Tensor) -> Tensor:
        """`cross_entropy` without the logits: a chunk of tokens at a time, its gradient made while its logits are there."""
        x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
        weight_VD = self.output_weight(embedding_VD)
        if torch.is_autocast_enabled(x_ND.device.type):
            dtype = torch.get_autocast_dtype(x_ND.device.type)
            x_ND, weight_VD = x_ND.to(dtype), weight_VD.to(dtype)
        with torch.autocast(x_ND.device.type, enabled=False):
            loss: Tensor = ChunkedCrossEntropy.apply(x_ND, weight_VD, targets_N, denominator, self.softcap, torch.is_grad_enabled())
        return loss


def shifted(labels_BT: Tensor) -> Tensor:
    """Targets of a causal model: position t predicts label t + 1; the last predicts nothing."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, denominator: Tensor) -> Tensor:
    """Sum over the targets, in float32, divided by the denominator (tokens of the global batch)."""
    total = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / denominator


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(cap(x W^T))[target] / denominator, by chunks of tokens.

    The gradient is made in the forward, where a chunk's logits still exist: the backward only scales it. So the largest temporary
    is a chunk, not [N, V], and the logits are computed once (recomputing them in the backward would cost a third more).
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, denominator: Tensor, softcap: float | None, with_grad: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        need_x, need_weight = (with_grad and need for need in ctx.needs_input_grad[:2])
        grad_x = torch.empty_like(x_ND) if need_x else None
        grad_weight = torch.zeros_like(weight_VD) if need_weight else None
        total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        size = max(1, CHUNK_ELEMENTS // weight_VD.shape[0])
        for start in range(0, x_ND.shape[0], size):
            rows = slice(start, start + size)
            loss, grad_CV = _chunk(x_ND[rows], weight_VD, targets_N[rows], softcap, need_x or need_weight)
            total += loss
            if grad_CV is None:
                continue
            grad_CV = (grad_CV / denominator).to(x_ND.dtype)
            if grad_x is not None:
                grad_x[rows] = grad_CV @ weight_VD
            if grad_weight is not None:
                grad_weight.addmm_(grad_CV.T, x_ND[rows])
        ctx.save_for_backward(grad_x, grad_weight)
        return total / denominator

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        if grad is None:
            return (None,) * 6
        return (
            None if grad_x is None else grad_x * grad.to(grad_x.dtype),
            None if grad_weight is None else grad_weight * grad.to(grad_weight.dtype),
            None,
            None,
            None,
            None,
        )


def _chunk(x_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, softcap: float | None, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Summed loss of a chunk, and its gradient by the logits before the cap, both in float32."""
    logits_CV = F.linear(x_CD, weight_VD).float()
    if softcap is not None:
        logits_CV = logits_CV.div_(softcap).tanh_().mul_(softcap)
    is_target_C = targets_C != IGNORED
    index_C1 = targets_C.clamp(min=0)[:, None]
    log_z_C = logits_CV.logsumexp(-1)
    loss = ((log_z_C - logits_CV.gather(1, index_C1).squeeze(1)) * is_target_C).sum()
    if not with_grad:
        return loss, None
    slope_CV = None if softcap is None else 1 - (logits_CV / softcap).square()
    grad_CV = logits_CV.sub_(log_z_C[:, None]).exp_()
    grad_CV.scatter_add_(1, index_C1, torch.full_like(index_C1, -1, dtype=grad_CV.dtype))
    grad_CV.mul_(is_target_C[:, None])
    return loss, grad_CV if slope_CV is None else grad_CV.mul_(slope_CV)

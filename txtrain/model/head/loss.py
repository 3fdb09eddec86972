"""Cross-entropy of the head's logits, by chunks of tokens: all logits are never held at once."""

# N tokens (batch and positions flattened), C tokens of one chunk, D model size, V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from txtrain.model.trace.tape import CACHED_ELEMENTS, CHUNK_ELEMENTS, CHUNK_ROWS

IGNORED = -100  # a label that is no target, as in torch and Hugging Face


class Vocabulary:
    """The rows of the output matrix that are here: all of them, unless ranks share it."""

    def rows_per_chunk(self, weight_VD: Tensor) -> int:
        """Tokens whose logits are held at a time."""
        return max(CHUNK_ROWS, CHUNK_ELEMENTS // weight_VD.shape[0])

    def find(self, targets_C: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
        """The row of each target, and whether it is here."""
        is_target_C = targets_C != IGNORED
        return targets_C.masked_fill(~is_target_C, 0), is_target_C

    def log_z_and_target(self, logits_CV: Tensor, rows_C: Tensor, is_here_C: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the softmax's denominator, and the target's logit, over the whole vocabulary: [C] each."""
        return _log_z(logits_CV), logits_CV.gather(1, rows_C[:, None]).squeeze(1) * is_here_C

    def n_words(self, weight_VD: Tensor) -> int:
        """The size of the whole vocabulary."""
        return weight_VD.shape[0]

    def log_z(self, logits_CV: Tensor) -> Tensor:
        """Log of the softmax's denominator, over the whole vocabulary: [C]."""
        return _log_z(logits_CV)

    def total(self, values_CV: Tensor) -> Tensor:
        """The sum over the whole vocabulary: [C]."""
        return values_CV.sum(-1)


def cross_entropy(logits: Tensor, targets: Tensor, denominator: Tensor) -> Tensor:
    """Sum over the targets, in float32, divided by the denominator (targets of the global batch)."""
    total = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / denominator


def class_loss(
    kind: str, logits_BC: Tensor, labels: Tensor, denominator: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """A sum over the rows, in float32, divided by the denominator (`n_class_targets` of the global batch).

    kind: single: cross-entropy, labels [B], -100: none; multi: binary cross-entropy of each class, labels [B, C] of 0
    and 1; regression: squared error, labels [B, C], or [B] of one number. As ...ForSequenceClassification.
    """
    return _class_losses(kind, logits_BC, labels, label_smoothing, "sum") / denominator


def class_losses(kind: str, logits_BC: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of each row, and its number of targets: [B] each."""
    losses = _class_losses(kind, logits_BC, labels, 0.0, "none").view(len(labels), -1)
    counted = (labels != IGNORED) if kind == "single" else torch.ones_like(losses)
    return losses.sum(1), counted.view(len(labels), -1).sum(1)


def _class_losses(kind: str, logits_BC: Tensor, labels: Tensor, label_smoothing: float, reduction: str) -> Tensor:
    logits_BC = logits_BC.float()
    if kind == "single":
        return F.cross_entropy(
            logits_BC, labels, ignore_index=IGNORED, reduction=reduction, label_smoothing=label_smoothing
        )
    if kind == "multi":
        return F.binary_cross_entropy_with_logits(logits_BC, labels.float(), reduction=reduction)
    return F.mse_loss(logits_BC, labels.float().view_as(logits_BC), reduction=reduction)


def n_class_targets(kind: str, labels: Tensor) -> Tensor:
    """Rows with a class; or the number of all labels, of every class."""
    if kind == "single":
        return (labels != IGNORED).sum()
    return torch.tensor(labels.numel(), device=labels.device)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(cap(x W^T + b))[target] / denominator, by chunks of tokens.

    The forward computes the gradient while a chunk's logits exist; the backward only scales it. So the largest
    temporary is a chunk, not [N, V], and logits are computed once (recomputing them would cost a third more).
    smoothing: share of the target's probability that is spread over all tokens (Szegedy et al. 2015, 1512.00567).
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, denominator: Tensor,
        softcap: float | None, vocabulary: Vocabulary, with_grad: bool, smoothing: float,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        wanted = [with_grad and need for need in ctx.needs_input_grad[:3]]
        inputs = x_ND, weight_VD, bias_V, targets_N
        gradients = Gradients(inputs, wanted)
        total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        for rows, loss_C, grad_CV in _chunks(inputs, softcap, vocabulary, any(wanted), denominator, smoothing):
            total += loss_C.sum()
            if grad_CV is not None:
                gradients.add(rows, grad_CV)
            del grad_CV  # before the next chunk's logits are made
        ctx.save_for_backward(*gradients.made())
        return total / denominator

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*times(ctx.saved_tensors, grad), None, None, None, None, None, None)


class ChunkedTokenLosses(torch.autograd.Function):
    """-log softmax(cap(x W^T + b) / temperature)[target] of each token, [N], by chunks of tokens; 0 without a target.

    The gradient of each token's loss is known only in the backward, which computes each chunk's logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, softcap: float | None,
        vocabulary: Vocabulary, temperature: float,
    ) -> Tensor:
        ctx.how, inputs = (softcap, vocabulary, temperature), (x_ND, weight_VD, bias_V, targets_N)
        ctx.save_for_backward(*inputs)
        chunks = _chunks(inputs, softcap, vocabulary, False, temperature=temperature)
        return torch.cat([loss_C for _, loss_C, _ in chunks])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        inputs, (softcap, vocabulary, temperature) = ctx.saved_tensors, ctx.how
        gradients = Gradients(inputs, ctx.needs_input_grad)
        with torch.autocast(grad_N.device.type, enabled=False):  # dtypes are those of the forward
            for rows, _, grad_CV in _chunks(inputs, softcap, vocabulary, True, temperature=temperature):
                assert grad_CV is not None
                gradients.add(rows, grad_CV.mul_(grad_N[rows, None]))
                del grad_CV  # before the next chunk's logits are made
        return (*gradients.made(), None, None, None, None)


class Gradients:
    """Those of x, weight and bias that are wanted, summed over chunks of tokens at least in float32: in bfloat16 a sum
    of hundreds of alike chunks stops to grow."""

    def __init__(self, inputs: Sequence[Any], wanted: Sequence[bool]) -> None:
        self.inputs = x_ND, weight_VD, _ = tuple(inputs[:3])
        self.of_x = torch.empty_like(x_ND) if wanted[0] else None
        self.of_weight = torch.zeros_like(weight_VD, dtype=wide(weight_VD.dtype)) if wanted[1] else None
        self.of_bias = torch.zeros_like(weight_VD[:, 0], dtype=wide(weight_VD.dtype)) if wanted[2] else None

    def add(self, rows: slice, grad_CV: Tensor) -> None:
        x_ND, weight_VD, _ = self.inputs
        if self.of_bias is not None:
            self.of_bias += grad_CV.sum(0)
        grad_CV = grad_CV.to(x_ND.dtype)
        if self.of_x is not None:
            self.of_x[rows] = grad_CV @ weight_VD
        if self.of_weight is not None:
            add_product(self.of_weight, grad_CV.T, x_ND[rows])

    def made(self) -> tuple[Tensor | None, ...]:
        of_both = zip((self.of_weight, self.of_bias), self.inputs[1:], strict=True)
        return self.of_x, *(None if total is None else total.to(given.dtype) for total, given in of_both)


def add_product(total_VD: Tensor, a_VC: Tensor, b_CD: Tensor) -> None:
    """total += a b, which is of a lower precision: by parts, so that the product beside the total is small."""
    if total_VD.dtype == b_CD.dtype:
        total_VD.addmm_(a_VC, b_CD)
        return
    size = max(1, CHUNK_ELEMENTS // b_CD.shape[1])
    for total_PD, a_PC in zip(total_VD.split(size), a_VC.split(size), strict=True):
        total_PD += a_PC @ b_CD


def times(made: Sequence[Tensor | None], grad: Tensor | None) -> Iterator[Tensor | None]:
    """The gradients that a forward made, times that of its result: in their own memory, unless the graph is kept."""
    kept = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
    for g in made:
        if g is None or grad is None:
            yield None
        else:
            yield g * grad.to(g.dtype) if kept else g.mul_(grad.to(g.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over logits: float32, or float64 if theirs is."""
    return torch.promote_types(dtype, torch.float32)


def cached_rows(logits_CV: Tensor) -> int:
    """Rows at a time for several operations on each logit: on the CPU so few that they stay in a core's cache."""
    return max(1, CACHED_ELEMENTS // logits_CV.shape[1]) if logits_CV.device.type == "cpu" else max(1, len(logits_CV))


def _log_z(logits_CV: Tensor) -> Tensor:
    """Over the rows that are here."""
    return torch.cat([part_CV.logsumexp(-1) for part_CV in logits_CV.split(cached_rows(logits_CV))])


def _chunks(
    inputs: Sequence[Any], softcap: float | None, vocabulary: Vocabulary, with_grad: bool,
    denominator: Tensor | None = None, smoothing: float = 0.0, temperature: float = 1.0,
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """The tokens of each chunk, and its `_chunk`; at least one. inputs: x_ND, weight_VD, bias_V, targets_N."""
    x_ND, weight_VD, bias_V, targets_N = inputs
    size = vocabulary.rows_per_chunk(weight_VD)
    for start in range(0, max(1, len(x_ND)), size):
        rows = slice(start, start + size)
        given = x_ND[rows], weight_VD, bias_V, targets_N[rows], softcap, vocabulary, with_grad, denominator
        yield rows, *_chunk(*given, smoothing, temperature)


def chunk_logits(x_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    """The logits [C, V] after the cap, at least in float32."""
    logits_CV = F.linear(x_CD, weight_VD, bias_V)
    logits_CV = logits_CV.to(wide(logits_CV.dtype))
    if softcap is not None:
        for part_CV in logits_CV.split(cached_rows(logits_CV)):
            part_CV.div_(softcap).tanh_().mul_(softcap)
    return logits_CV


def _chunk(
    x_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_C: Tensor, softcap: float | None,
    vocabulary: Vocabulary, with_grad: bool, denominator: Tensor | None, smoothing: float, temperature: float,
) -> tuple[Tensor, Tensor | None]:
    """Losses of the tokens [C], and their gradients by the logits before the cap, at least in float32.

    denominator: of the gradients alone.
    """
    logits_CV = chunk_logits(x_CD, weight_VD, bias_V, softcap)
    if temperature != 1:
        logits_CV.div_(temperature)
    is_target_C = targets_C != IGNORED
    rows_C, is_here_C = vocabulary.find(targets_C, weight_VD.shape[0])
    log_z_C, target_C = vocabulary.log_z_and_target(logits_CV, rows_C, is_here_C)
    n_words = vocabulary.n_words(weight_VD)
    if smoothing:
        target_C = torch.lerp(target_C, vocabulary.total(logits_CV) / n_words, smoothing)
    loss_C = (log_z_C - target_C) * is_target_C
    if not with_grad:
        return loss_C, None
    of_target_C1 = is_here_C[:, None].to(logits_CV.dtype) * (smoothing - 1)
    below_C1 = torch.where(is_target_C, 1.0 if denominator is None else denominator, torch.inf)[:, None]
    size = cached_rows(logits_CV)
    for start in range(0, len(logits_CV), size):
        rows = slice(start, start + size)
        part_CV = logits_CV[rows]
        slope_CV = None if softcap is None else 1 - (part_CV * (temperature / softcap)).square()
        part_CV.sub_(log_z_C[rows, None]).exp_().scatter_add_(1, rows_C[rows, None], of_target_C1[rows])
        if smoothing:
            part_CV.sub_(smoothing / n_words)
        if slope_CV is not None:
            part_CV.mul_(slope_CV)
        del slope_CV  # before the next part's is made
        if temperature != 1:
            part_CV.div_(temperature)
        part_CV.div_(below_C1[rows])  # 0 where there is no target
    return loss_C, logits_CV

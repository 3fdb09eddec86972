"""What leaves the last block: logits, and the loss that never holds all of them."""

# N tokens (batch and positions flattened), C tokens of one chunk, D model size, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from txtrain.memory.tape import CHUNK_ELEMENTS
from txtrain.model.ffn import ACTIVATIONS

IGNORED = -100  # a label that is no target, as in torch and Hugging Face


class Vocabulary:
    """Which rows of the output matrix are here: all of them, unless the matrix lies in parts somewhere else too."""

    def rows_per_chunk(self, weight_VD: Tensor) -> int:
        """Tokens whose logits are held at a time."""
        return max(1, CHUNK_ELEMENTS // weight_VD.shape[0])

    def find(self, targets_C: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
        """The row of each target here, and whether it is here."""
        return targets_C.clamp(min=0), targets_C != IGNORED

    def log_z_and_target(self, logits_CV: Tensor, rows_C: Tensor, is_here_C: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of the softmax' denominator, and the target's logit, both over the whole vocabulary: [C]."""
        return logits_CV.logsumexp(-1), logits_CV.gather(1, rows_C[:, None]).squeeze(1) * is_here_C


class Head(nn.Module):
    """What the transformer asks of a head. `embedding_VD` is the embedding's weight, for heads that are tied to it."""

    shift: bool = False  # whether position t predicts label t + 1, as a causal model's does, or label t

    def forward(self, x_BTD: Tensor, embedding_VD: Tensor | None, valid_BT: Tensor | None = None) -> Tensor:
        """Logits: [B, T, V], or [B, classes]."""
        raise NotImplementedError

    def targets(self, labels: Tensor) -> Tensor:
        """What the logits of each position are to predict: the label of the same position, unless the head says otherwise."""
        return labels

    def loss(self, x_BTD: Tensor, embedding_VD: Tensor | None, targets: Tensor, denominator: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        """`cross_entropy` of the logits, without holding all of them where they are many."""
        return cross_entropy(self(x_BTD, embedding_VD, valid_BT), targets, denominator)

    def sentence_logits(self, x_BTD: Tensor) -> Tensor | None:
        """Whether the second sentence follows the first, [B, 2], where the head can tell."""
        return None


class LMHead(Head):
    """Logits over the vocabulary; softcap * tanh(logits / softcap) where set (Gemma 2). A tied head owns no matrix.

    shift: position t predicts label t + 1 (a causal model); otherwise label t. scale: what enters is multiplied by it (T5 v1.0).
    """

    vocabulary = Vocabulary()

    def __init__(
        self, dim: int, vocab_size: int, tied: bool, softcap: float | None = None, bias: bool = False, scale: float | None = None, shift: bool = True
    ) -> None:
        super().__init__()
        self.softcap, self.scale, self.shift = softcap, scale, shift
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, dim))
        self.bias = nn.Parameter(torch.empty(vocab_size)) if bias else None

    def reset_parameters(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def output_weight(self, embedding_VD: Tensor | None) -> Tensor:
        weight = embedding_VD if self.weight is None else self.weight
        assert weight is not None
        return weight

    def entering(self, x_BTD: Tensor) -> Tensor:
        """What meets the output matrix."""
        return x_BTD if self.scale is None else x_BTD * self.scale

    def forward(self, x_BTD: Tensor, embedding_VD: Tensor | None, valid_BT: Tensor | None = None) -> Tensor:
        logits = F.linear(self.entering(x_BTD), self.output_weight(embedding_VD), self.bias)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def targets(self, labels: Tensor) -> Tensor:
        return shifted(labels) if self.shift else labels

    def loss(self, x_BTD: Tensor, embedding_VD: Tensor | None, targets: Tensor, denominator: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        """A chunk of tokens at a time, its gradient made while its logits are there."""
        return self.chunked(self.entering(x_BTD).flatten(0, 1), embedding_VD, targets.flatten(), denominator)

    def chunked(self, x_ND: Tensor, embedding_VD: Tensor | None, targets_N: Tensor, denominator: Tensor) -> Tensor:
        weight_VD = self.output_weight(embedding_VD)
        bias_V: Tensor | None = self.bias
        if torch.is_autocast_enabled(x_ND.device.type):
            dtype = torch.get_autocast_dtype(x_ND.device.type)
            x_ND, weight_VD = x_ND.to(dtype), weight_VD.to(dtype)
            bias_V = bias_V if bias_V is None else bias_V.to(dtype)
        with torch.autocast(x_ND.device.type, enabled=False):
            return ChunkedCrossEntropy.apply(x_ND, weight_VD, bias_V, targets_N, denominator, self.softcap, self.vocabulary, torch.is_grad_enabled())


class MLMHead(LMHead):
    """BERT's (Devlin et al. 2018, 1810.04805): dense, activation, norm, then the vocabulary with a bias.

    next_sentence: beside it the pooler (dense and tanh of the first position) and the head that tells whether the sentences follow.
    """

    def __init__(
        self, dim: int, vocab_size: int, tied: bool, norm: Callable[[int], nn.Module], softcap: float | None, activation: str, next_sentence: bool
    ) -> None:
        super().__init__(dim, vocab_size, tied, softcap, bias=True, shift=False)
        self.dense = nn.Linear(dim, dim)
        self.act = ACTIVATIONS[activation]
        self.norm = norm(dim)
        self.pooler = nn.Linear(dim, dim) if next_sentence else None
        self.next_sentence = nn.Linear(dim, 2) if next_sentence else None

    def entering(self, x_BTD: Tensor) -> Tensor:
        return self.norm(self.act(self.dense(x_BTD)))

    def loss(self, x_BTD: Tensor, embedding_VD: Tensor | None, targets: Tensor, denominator: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        """Only the positions that have a target, a seventh or so, go through the head."""
        chosen = targets != IGNORED
        return self.chunked(self.entering(x_BTD[chosen]), embedding_VD, targets[chosen], denominator)

    def sentence_logits(self, x_BTD: Tensor) -> Tensor | None:
        if self.pooler is None or self.next_sentence is None:
            return None
        return self.next_sentence(torch.tanh(self.pooler(x_BTD[:, 0])))


class ClassHead(Head):
    """One score a class, from one vector a sequence: its first position, its last real one, or the mean of the real ones."""

    def __init__(self, dim: int, n_classes: int, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling
        self.classifier = nn.Linear(dim, n_classes)

    def forward(self, x_BTD: Tensor, embedding_VD: Tensor | None, valid_BT: Tensor | None = None) -> Tensor:
        return self.classifier(POOLINGS[self.pooling](x_BTD, valid_BT))


def _first(x_BTD: Tensor, valid_BT: Tensor | None) -> Tensor:
    if valid_BT is None:
        return x_BTD[:, 0]
    return x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), valid_BT.int().argmax(1)]


def _last(x_BTD: Tensor, valid_BT: Tensor | None) -> Tensor:
    if valid_BT is None:
        return x_BTD[:, -1]
    last = valid_BT.shape[1] - 1 - valid_BT.flip(1).int().argmax(1)
    return x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), last]


def _mean(x_BTD: Tensor, valid_BT: Tensor | None) -> Tensor:
    if valid_BT is None:
        return x_BTD.mean(1)
    weights = valid_BT.to(x_BTD.dtype)
    return (x_BTD * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)


POOLINGS = {"first": _first, "last": _last, "mean": _mean}


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

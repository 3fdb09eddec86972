"""Heads: logits over the vocabulary, or over classes."""

# B batch, T positions, N tokens (batch and positions flattened), D model size, V vocabulary

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txtrain.model.ffn.dense import ACTIVATIONS
from txtrain.model.head.distillation import ChunkedDistillation, Distillation
from txtrain.model.head.loss import IGNORED, ChunkedCrossEntropy, ChunkedTokenLosses, Vocabulary, cross_entropy


class Head(nn.Module):
    """What the transformer asks of a head. `embedding_VD` is the embedding's weight, for tied heads."""

    pools: bool = False  # whether it has one result and one label per row
    shift: bool = False  # whether position t predicts label t + 1 (a causal model), or label t

    def forward(self, x_BTD: Tensor, embedding_VD: Tensor | None, valid_BT: Tensor | None = None) -> Tensor:
        """Logits: [B, T, V], or [B, classes]."""
        raise NotImplementedError

    def targets(self, labels: Tensor) -> Tensor:
        """The label that each position's logits predict; -100: none."""
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED) if self.shift else labels

    def loss(self, x_BTD: Tensor, embedding_VD: Tensor | None, targets: Tensor, denominator: Tensor) -> Tensor:
        """`cross_entropy` of the logits. This and `log_probs`: only of a head over the vocabulary."""
        return cross_entropy(self(x_BTD, embedding_VD), targets, denominator)

    def log_probs(self, x_BTD: Tensor, embedding_VD: Tensor | None, labels_BT: Tensor) -> Tensor:
        """Log-probability of each label, [B, T], 0 where it is -100."""
        raise NotImplementedError

    def sentence_logits(self, x_BTD: Tensor) -> Tensor | None:
        """Whether the second sentence follows the first, [B, 2]; None if the head does not predict it."""
        return None


class LMHead(Head):
    """Logits over the vocabulary. A tied head owns no matrix. scale: a factor on the input (T5 v1.0)."""

    vocabulary = Vocabulary()

    def __init__(
        self, dim: int, vocab_size: int, tied: bool, softcap: float | None = None, bias: bool = False,
        scale: float | None = None, shift: bool = True,
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
        """The input of the output matrix."""
        return x_BTD if self.scale is None else x_BTD * self.scale

    def forward(self, x_BTD: Tensor, embedding_VD: Tensor | None, valid_BT: Tensor | None = None) -> Tensor:
        logits = F.linear(self.entering(x_BTD), self.output_weight(embedding_VD), self.bias)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def loss(self, x_BTD: Tensor, embedding_VD: Tensor | None, targets: Tensor, denominator: Tensor) -> Tensor:
        return self.chunked(self.entering(x_BTD).flatten(0, 1), embedding_VD, targets.flatten(), denominator)

    def log_probs(self, x_BTD: Tensor, embedding_VD: Tensor | None, labels_BT: Tensor) -> Tensor:
        """Only positions with a target go through the head, by chunks."""
        targets_BT = self.targets(labels_BT)
        chosen_BT = targets_BT != IGNORED
        losses_N = self.chunked(self.entering(x_BTD[chosen_BT]), embedding_VD, targets_BT[chosen_BT], None)
        found_BT = losses_N.new_zeros(targets_BT.shape).masked_scatter(chosen_BT, -losses_N)
        return F.pad(found_BT[:, :-1], (1, 0)) if self.shift else found_BT

    def multiplied(self, x_ND: Tensor, embedding_VD: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, matrix and bias of the logits, in the dtype of matrix products."""
        weight_VD, bias_V = self.output_weight(embedding_VD), self.bias
        if not torch.is_autocast_enabled(x_ND.device.type):
            return x_ND, weight_VD, bias_V
        dtype = torch.get_autocast_dtype(x_ND.device.type)
        return x_ND.to(dtype), weight_VD.to(dtype), bias_V if bias_V is None else bias_V.to(dtype)

    def distilled(self, x_BTD: Tensor, embedding_VD: Tensor | None, labels_BT: Tensor, how: Distillation) -> Tensor:
        """The divergence from a teacher at the positions with a target, and their cross-entropy: summed, mixed."""
        x_ND, targets_N = self.entering(x_BTD).flatten(0, 1), self.targets(labels_BT).flatten()
        given = *self.multiplied(x_ND, embedding_VD), targets_N
        with_grad = torch.is_grad_enabled()
        # Not with autocast off: the teacher's forward lies within.
        return ChunkedDistillation.apply(*given, self.softcap, self.vocabulary, how, with_grad)

    def chunked(
        self, x_ND: Tensor, embedding_VD: Tensor | None, targets_N: Tensor, denominator: Tensor | None
    ) -> Tensor:
        """The summed loss divided by the denominator; without one each token's loss, [N]."""
        given = *self.multiplied(x_ND, embedding_VD), targets_N
        with torch.autocast(x_ND.device.type, enabled=False):
            if denominator is None:
                return ChunkedTokenLosses.apply(*given, self.softcap, self.vocabulary)
            with_grad = torch.is_grad_enabled()
            return ChunkedCrossEntropy.apply(*given, denominator, self.softcap, self.vocabulary, with_grad)


class MLMHead(LMHead):
    """BERT's (1810.04805): dense, activation, norm, vocabulary with bias; next_sentence: pooler, next-sentence head."""

    def __init__(
        self, dim: int, vocab_size: int, tied: bool, norm: Callable[[int], nn.Module], softcap: float | None,
        activation: str, next_sentence: bool,
    ) -> None:
        super().__init__(dim, vocab_size, tied, softcap, bias=True, shift=False)
        self.dense = nn.Linear(dim, dim)
        self.act = ACTIVATIONS[activation]
        self.norm = norm(dim)
        self.pooler = nn.Linear(dim, dim) if next_sentence else None
        self.next_sentence = nn.Linear(dim, 2) if next_sentence else None

    def entering(self, x_BTD: Tensor) -> Tensor:
        return self.norm(self.act(self.dense(x_BTD)))

    def loss(self, x_BTD: Tensor, embedding_VD: Tensor | None, targets: Tensor, denominator: Tensor) -> Tensor:
        """Only positions with a target, about a seventh, go through the head."""
        chosen = targets != IGNORED
        return self.chunked(self.entering(x_BTD[chosen]), embedding_VD, targets[chosen], denominator)

    def sentence_logits(self, x_BTD: Tensor) -> Tensor | None:
        if self.pooler is None or self.next_sentence is None:
            return None
        return self.next_sentence(torch.tanh(self.pooler(x_BTD[:, 0])))


class ClassHead(Head):
    """One score per class, from the first or last real position, or the mean of the real ones."""

    pools = True

    def __init__(self, dim: int, n_classes: int, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling
        self.classifier = nn.Linear(dim, n_classes)

    def forward(self, x_BTD: Tensor, embedding_VD: Tensor | None, valid_BT: Tensor | None = None) -> Tensor:
        return self.classifier(self._pooled(x_BTD, valid_BT))

    def _pooled(self, x_BTD: Tensor, valid_BT: Tensor | None) -> Tensor:
        if self.pooling == "mean":
            if valid_BT is None:
                return x_BTD.mean(1)
            weights_BT1 = valid_BT.to(x_BTD.dtype)[..., None]
            return (x_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)
        if valid_BT is None:
            return x_BTD[:, 0 if self.pooling == "first" else -1]
        index_B = valid_BT.int().argmax(1)
        if self.pooling == "last":
            index_B = valid_BT.shape[1] - 1 - valid_BT.flip(1).int().argmax(1)
        return x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), index_B]

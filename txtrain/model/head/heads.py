"""Heads: logits over the vocabulary, or over classes."""

# B batch, T positions, N tokens (batch and positions flattened), D model size, V vocabulary, C classes

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txtrain.errors import ConfigError
from txtrain.model.ffn.dense import ACTIVATIONS
from txtrain.model.head.config import Kind
from txtrain.model.head.distillation import ChunkedDistillation, Distillation
from txtrain.model.head.loss import (
    IGNORED,
    ChunkedCrossEntropy,
    ChunkedTokenLosses,
    Vocabulary,
    class_loss,
    cross_entropy,
    n_class_targets,
)
from txtrain.model.inputs import FLOATS, LABELS, require


class Head(nn.Module):
    """What the transformer asks of a head. `embedding_VD` is the embedding's weight, for tied heads."""

    pools: bool = False  # whether it has one result and one label per row
    shift: bool = False  # whether position t predicts label t + 1 (a causal model), or label t

    def forward(self, x_BTD: Tensor, embedding_VD: Tensor | None, valid_BT: Tensor | None = None) -> Tensor:
        """Logits: [B, T, V], or [B, classes]."""
        raise NotImplementedError

    def check_labels(self, labels: object, B: int, T: int) -> None:
        """Raise a ConfigError unless these are labels of B rows of T positions, by shape and dtype."""
        require("labels", labels, {"B": B, "T": T}, LABELS)

    def targets(self, labels: Tensor) -> Tensor:
        """The label that each position's logits predict; -100: none."""
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED) if self.shift else labels

    def loss(self, x_BTD: Tensor, embedding_VD: Tensor | None, targets: Tensor, denominator: Tensor) -> Tensor:
        """`cross_entropy` of the logits. This and `log_probs`: only of a head over the vocabulary."""
        return cross_entropy(self(x_BTD, embedding_VD), targets, denominator)

    def n_targets(self, targets: Tensor) -> Tensor:
        """The number of targets, by which a sum of losses becomes their mean."""
        return (targets != IGNORED).sum()

    def loss_of(self, logits: Tensor, targets: Tensor, denominator: Tensor) -> Tensor:
        """The loss of logits that are there already."""
        return cross_entropy(logits, targets, denominator)

    def log_probs(
        self, x_BTD: Tensor, embedding_VD: Tensor | None, labels_BT: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Log-probability of each label, [B, T], 0 where it is -100. temperature: by which the logits are divided."""
        raise NotImplementedError

    def sentence_logits(self, x_BTD: Tensor) -> Tensor | None:
        """Whether the second sentence follows the first, [B, 2]; None if the head does not predict it."""
        return None


class LMHead(Head):
    """Logits over the vocabulary. A tied head owns no matrix. scale: a factor on the input (T5 v1.0)."""

    vocabulary = Vocabulary()
    product = staticmethod(F.linear)

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
        logits = self.product(self.entering(x_BTD), self.output_weight(embedding_VD), self.bias)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def loss(
        self, x_BTD: Tensor, embedding_VD: Tensor | None, targets: Tensor, denominator: Tensor, smoothing: float = 0.0
    ) -> Tensor:
        """smoothing: of the labels, see `ChunkedCrossEntropy`."""
        x_ND = self.entering(x_BTD).flatten(0, 1)
        return self.chunked(x_ND, embedding_VD, targets.flatten(), denominator, smoothing)

    def log_probs(
        self, x_BTD: Tensor, embedding_VD: Tensor | None, labels_BT: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Only positions with a target go through the head, by chunks."""
        targets_BT = self.targets(labels_BT)
        chosen_BT = targets_BT != IGNORED
        given = self.entering(x_BTD[chosen_BT]), embedding_VD, targets_BT[chosen_BT]
        losses_N = self.chunked(*given, None, temperature=temperature)
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
        self, x_ND: Tensor, embedding_VD: Tensor | None, targets_N: Tensor, denominator: Tensor | None,
        smoothing: float = 0.0, temperature: float = 1.0,
    ) -> Tensor:
        """The summed loss divided by the denominator; without one each token's loss, [N], at that temperature."""
        given = *self.multiplied(x_ND, embedding_VD), targets_N
        with torch.autocast(x_ND.device.type, enabled=False):
            if denominator is None:
                return ChunkedTokenLosses.apply(*given, self.softcap, self.vocabulary, temperature)
            with_grad = torch.is_grad_enabled()
            return ChunkedCrossEntropy.apply(*given, denominator, self.softcap, self.vocabulary, with_grad, smoothing)


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

    def loss(
        self, x_BTD: Tensor, embedding_VD: Tensor | None, targets: Tensor, denominator: Tensor, smoothing: float = 0.0
    ) -> Tensor:
        """Only positions with a target, about a seventh, go through the head."""
        chosen = targets != IGNORED
        return self.chunked(self.entering(x_BTD[chosen]), embedding_VD, targets[chosen], denominator, smoothing)

    def sentence_logits(self, x_BTD: Tensor) -> Tensor | None:
        if self.pooler is None or self.next_sentence is None:
            return None
        return self.next_sentence(torch.tanh(self.pooler(x_BTD[:, 0])))


class ClassHead(Head):
    """One score per class, from the first or last real position, or the mean of the real ones, after a pooler if any.

    kind: single, multi or regression, as `class_loss`. lm: training also predicts the next token, by the embedding.
    """

    pools = True

    def __init__(
        self, dim: int, vocab_size: int, n_classes: int, pooling: str, pooler: bool, bias: bool, dropout: float,
        input_dropout: float, kind: Kind, lm: bool,
    ) -> None:
        super().__init__()
        self.pooling, self.kind, self.n_classes = pooling, kind, n_classes
        self.input_dropout, self.dropout = nn.Dropout(input_dropout), nn.Dropout(dropout)
        self.pooler = nn.Linear(dim, dim) if pooler else None
        self.classifier = nn.Linear(dim, n_classes, bias=bias)
        self.next_token = LMHead(dim, vocab_size, tied=True) if lm else None

    def forward(self, x_BTD: Tensor, embedding_VD: Tensor | None, valid_BT: Tensor | None = None) -> Tensor:
        x_BD = self._pooled(x_BTD, valid_BT)
        if self.pooler is not None:
            x_BD = torch.tanh(self.pooler(self.input_dropout(x_BD)))
        return self.classifier(self.dropout(x_BD))

    def _pooled(self, x_BTD: Tensor, valid_BT: Tensor | None) -> Tensor:
        if self.pooling == "first":  # whatever the padding, as in transformers
            return x_BTD[:, 0]
        if self.pooling == "mean":
            if valid_BT is None:
                return x_BTD.mean(1)
            weights_BT1 = valid_BT.to(x_BTD.dtype)[..., None]
            return (x_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)
        if valid_BT is None:
            return x_BTD[:, -1]
        last_B = (torch.arange(valid_BT.shape[1], device=valid_BT.device) * valid_BT).argmax(1)
        return x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), last_B]

    def check_labels(self, labels: object, B: int, T: int) -> None:
        if self.kind == "single":
            require("labels", labels, {"B": B}, LABELS)
        elif self.kind == "regression" and self.n_classes == 1:
            require("labels", labels, {"B": B}, FLOATS)
        else:
            require("labels", labels, {"B": B, "C": self.n_classes}, FLOATS)

    def n_targets(self, targets: Tensor) -> Tensor:
        return n_class_targets(self.kind, targets)

    def loss_of(self, logits: Tensor, targets: Tensor, denominator: Tensor) -> Tensor:
        return class_loss(self.kind, logits, targets, denominator)

    def token_loss(
        self, x_BTD: Tensor, embedding_VD: Tensor | None, ids_BT: Tensor, denominator: Tensor
    ) -> Tensor:
        """The auxiliary loss: that of the next tokens. ids_BT: the input, -100: not a target."""
        assert self.next_token is not None, "model.head.lm"
        return self.next_token.loss(x_BTD, embedding_VD, self.next_token.targets(ids_BT), denominator)


class NoHead(Head):
    """The model of a folder without a head: it gives the last hidden states, and keeps the folder's pooler."""

    def __init__(self, dim: int, pooler: bool) -> None:
        super().__init__()
        self.pooler = nn.Linear(dim, dim) if pooler else None

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, embedding_VD: Tensor | None, valid_BT: Tensor | None = None
    ) -> None:
        return None

    def check_labels(self, labels: object, B: int, T: int) -> None:
        raise ConfigError("`labels` must not be given: the model has no head (model/head=none).")

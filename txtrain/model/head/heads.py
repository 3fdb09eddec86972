"""What leaves the last block: logits over the vocabulary, or scores of classes."""

# B batch, T positions, N tokens (batch and positions flattened), D model size, V vocabulary

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txtrain.model.ffn.dense import ACTIVATIONS
from txtrain.model.head.loss import IGNORED, ChunkedCrossEntropy, Vocabulary, cross_entropy, shifted


class Head(nn.Module):
    """What the transformer asks of a head. `embedding_VD` is the embedding's weight, for heads that are tied to it."""

    pools: bool = False  # whether it has one result a row, and so one label
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

    pools = True

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

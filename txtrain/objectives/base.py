"""The protocol between an objective and the training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Batch = Mapping[str, Tensor]
Terms = dict[str, Tensor]


class Objective:
    """Base of every objective.

    A term is a sum over the whole global batch divided by a denominator of the whole global batch. The training step asks for the
    denominators first, reduces them over all processes, and then calls the objective once a micro-batch: what comes back are shares
    that add up to the terms. So neither the micro-batch nor the number of processes changes the loss (a mean of means would).
    """

    weights: Mapping[str, float] = {"loss": 1.0}  # the total is the weighted sum of the terms named here
    perplexity: bool = False  # whether exp of the term `loss` is a perplexity: it is in nats a token

    def denominators(self, batch: Batch) -> Terms:
        """By what each term is divided: how many targets `batch` ([B, ...], any part of a step) has for it."""
        raise NotImplementedError

    def __call__(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        """This micro-batch's share of each term, already divided; scalars with a gradient."""
        raise NotImplementedError

    def target_ids(self, batch: Batch) -> Tensor | None:
        """The token ids [n] that the term `loss` predicts; None where it predicts no text. Bits per byte are counted on these."""
        return None

    def total(self, terms: Terms) -> Tensor:
        """What is minimised."""
        return sum((weight * terms[name] for name, weight in self.weights.items()), start=next(iter(terms.values())).new_zeros(()))

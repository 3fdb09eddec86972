"""The protocol between an objective, the data and the training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from txtrain.data.samples.rows import Rows
from txtrain.data.samples.text import TokenisedText
from txtrain.registry import make
from txtrain.run_config import RunConfig

IGNORED = -100  # a label that is no target, as in Hugging Face

Batch = Mapping[str, Tensor]
Terms = dict[str, Tensor]
Counted = dict[str, tuple[Tensor, Tensor]]


class Shown(NamedTuple):
    """What a model was given and what it answered; answer: None where it stands within the text. image: what `given` tells of, [C, H, W] from 0 to 1."""

    given: str
    answer: str | None = None
    image: Tensor | None = None

    @property
    def text(self) -> str:
        """Of the screen and samples.txt."""
        return self.given if self.answer is None else f"{self.given}|{self.answer}"

    @property
    def caption(self) -> str:
        """Of the image."""
        return f"{self.given}, {self.answer}"


class Objective:
    """Base of every objective.

    A term is a sum over the whole global batch divided by a denominator of the whole global batch. The training step asks for the
    denominators first, reduces them over all processes, and then calls the objective once a micro-batch: what comes back are shares
    that add up to the terms. So neither the micro-batch nor the number of processes changes the loss (a mean of means would).

    What a sample is, is the objective's too: masks, spans and pairs are made where the data are read, from the numbers of
    `txtrain.data.samples.draws`, so that they depend on the seed and the sample's global index alone.
    """

    weights: Mapping[str, float] = {"loss": 1.0}  # the total is the weighted sum of the terms named here
    beside: tuple[str, ...] = ()  # those that are minimised but no part of the loss that is told: it compares with models that lack them
    perplexity: bool = False  # whether exp of the term `loss` is a perplexity: it is in nats a token
    metrics: tuple[str, ...] = ()  # what validation tells beside the terms, from `validate` or `examine`
    check: Callable[[], None] = staticmethod(lambda: None)  # the run's: it may raise to stop what takes long
    models: Mapping[str, Callable[..., Any]] = {}  # that its config names, laid over the ranks, without gradients
    masks: bool = False  # labels that the data leave out (-100) stay out, where only some tokens are trained
    special_tokens: tuple[str, ...] = ()  # that a tokenizer must have; missing ones are added behind its vocabulary

    # --------------------------------------------------------------------------------------------------------------- data

    def samples(self, text: TokenisedText) -> Rows:
        """Samples of a text: by default sequences that a causal model predicts token by token."""
        return text.sequences()

    # ----------------------------------------------------------------------------------------------------------- training

    def denominators(self, batch: Batch) -> Terms:
        """By what each term is divided: how many targets `batch` ([B, ...], any part of a step) has for it."""
        raise NotImplementedError

    def __call__(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        """This micro-batch's share of each term, already divided; scalars with a gradient."""
        raise NotImplementedError

    def total(self, terms: Terms) -> Tensor:
        """What is minimised."""
        return sum((weight * terms[name] for name, weight in self.weights.items()), start=next(iter(terms.values())).new_zeros(()))

    def reported(self, terms: Mapping[str, Any]) -> Any:
        """`loss` and `val_loss`."""
        return sum(weight * terms[name] for name, weight in self.weights.items() if name not in self.beside)

    # --------------------------------------------------------------------------------------------------------- validation

    def validate(self, model: Callable[..., Any], batch: Batch) -> Counted:
        """Sum and count in this batch, of each term and of those `metrics` that are means over samples or targets."""
        counts = self.denominators(batch)
        sums = self(model, batch, {name: torch.ones_like(n) for name, n in counts.items()})
        return {name: (value, counts[name]) for name, value in sums.items()}

    def examine(self, model: Any, data: Any, micro_batch_size: int) -> dict[str, float]:
        """Those `metrics` that are of a whole set: once a validation, in all processes alike. data: None where a trainer was given loaders.

        What takes long calls `self.check()` from time to time, in all processes alike.
        """
        return {}

    def lengths(self, batch: Batch, seq_len: int) -> tuple[int, int]:
        """Positions of a sample of the batch, padding included: of what is read, and of what is written where a second stack writes."""
        read, written = (batch[name].shape[1] if name in batch and batch[name].ndim == 2 else seq_len for name in ("input_ids", "labels"))
        return read, written

    def target_ids(self, batch: Batch) -> Tensor | None:
        """The token ids [n] that the term `loss` predicts; None where it predicts no text. Bits per byte are counted on these."""
        return None

    def show(self, module: Any, data: Any, config: RunConfig, check: Callable[[], None]) -> list[Shown]:
        """A little of what the model says, for the screen, samples.txt and the loggers; in all processes alike.

        check: called after each token; it may raise to stop.
        """
        return []

    # ------------------------------------------------------------------------------------------------------------ columns

    @property
    def columns(self) -> tuple[str, ...]:
        """What metrics.csv has beside the columns of every run, known before the first step."""
        terms = [name for name in self.weights if name != "loss"]
        return (*terms, *(f"val_{name}" for name in terms), *self.metrics)


def build_objective(config: RunConfig) -> Objective:
    made: Objective = make("objective", config.objective, **config.objective.arguments(config))
    return made


def n_targets(labels: Tensor) -> Tensor:
    return (labels != IGNORED).sum()


def n_right(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of the labels that are targets are the most likely ones: logits [..., classes], labels [...]."""
    return ((logits.argmax(-1) == labels) & (labels != IGNORED)).sum()

"""The interface between an objective, the data and the training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from txtrain.data.samples.order import GlobalOrder
from txtrain.data.samples.rows import Rows
from txtrain.data.samples.text import TokenisedText
from txtrain.registry import make
from txtrain.run_config import RunConfig

ROWS = "rows"  # in `Objective.validate`: numbers of each sample, [B, k], of which `Objective.score` is made
IGNORED = -100  # label of positions without a target, as in Hugging Face

Batch = Mapping[str, Tensor]
Terms = dict[str, Tensor]
Counted = dict[str, tuple[Tensor, Tensor]]


class Shown(NamedTuple):
    """An example of a model's output. answer: None if `given` contains it. image: the input [C, H, W], from 0 to 1."""

    given: str
    answer: str | None = None
    image: Tensor | None = None

    @property
    def text(self) -> str:
        """For the screen and samples.txt."""
        return self.given if self.answer is None else f"{self.given}|{self.answer}"

    @property
    def caption(self) -> str:
        """Caption of the image."""
        return f"{self.given}, {self.answer}"


class Objective:
    """Base of every objective.

    A term is a sum over the global batch divided by a denominator of the global batch. The training step asks for the
    denominators, reduces them over all ranks, and calls the objective for each micro-batch; the returned shares add up
    to the terms. So neither micro-batch nor number of ranks changes the loss, as a mean of means would.

    The objective also makes the samples: masks, spans and pairs are drawn while data are read, from the numbers of
    `txtrain.data.samples.draws`, so that they depend only on the seed and the sample's global index.
    """

    weights: Mapping[str, float] = {"loss": 1.0}  # of the terms, whose weighted sum is minimised
    of_step: Mapping[str, float] = {}  # further values of the latest step, the same on all ranks; in `columns`
    beside: tuple[str, ...] = ()  # terms not in the reported loss, which stays comparable with models without them
    reports: tuple[str, ...] = ()  # terms that are not minimised, only reported
    perplexity: bool = False  # whether exp(`loss`) is a perplexity: `loss` is in nats per token
    metrics: tuple[str, ...] = ()  # further metrics of validation, from `validate` or `examine`
    check: Callable[[], None] = staticmethod(lambda: None)  # set by the run; may raise, to stop what takes long
    models: Mapping[str, Callable[..., Any]] = {}  # named by its config, laid over the ranks, without gradients
    masks: bool = False  # labels of -100 in the data stay: only some tokens are trained
    special_tokens: tuple[str, ...] = ()  # that it needs; missing ones are added at the end of the vocabulary

    # ------------------------------------------------------------------------------------------------------------- data

    def samples(self, text: TokenisedText) -> Rows:
        """Samples of a text: by default sequences for a causal model."""
        return text.sequences()

    def order(self, n: int, seed: int, overfit_batches: int) -> GlobalOrder | None:
        """The samples that each step reads, of n; None: as many as it trains on, in the order of the data."""
        return None

    # --------------------------------------------------------------------------------------------------------- training

    def begin(self, module: Any, data: Any) -> None:
        """Called on all ranks before the first batch is read, when the model has its weights. data: None: as `examine`.
        """

    def step_batch(self, module: Any, batch: Batch) -> Batch:
        """What this rank trains on in a step, from what it has read; on all ranks. Some objectives make samples."""
        return batch

    def state(self) -> Callable[[Path], None]:
        """What a checkpoint needs besides weights and numbers, taken now: a function that writes it into a folder."""
        return lambda folder: None

    def load_state(self, folder: Path) -> None:
        """Read what `state` has written."""

    def denominators(self, batch: Batch) -> Terms:
        """Denominator of each term: its number of targets in `batch` ([B, ...], any part of a step)."""
        raise NotImplementedError

    def __call__(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        """This micro-batch's share of each term, already divided; scalars with gradients."""
        raise NotImplementedError

    def total(self, terms: Terms) -> Tensor:
        """The weighted sum of the terms, which is minimised."""
        return sum(
            (weight * terms[name] for name, weight in self.weights.items()),
            start=next(iter(terms.values())).new_zeros(())
        )

    def reported(self, terms: Mapping[str, Any]) -> Any:
        """The value of `loss` and `val_loss`."""
        return sum(weight * terms[name] for name, weight in self.weights.items() if name not in self.beside)

    # ------------------------------------------------------------------------------------------------------- validation

    def validate(self, model: Callable[..., Any], batch: Batch) -> Counted:
        """Sum and count in this batch, of each term and of the `metrics` that are means over samples or targets.

        Beside them perhaps ROWS: numbers of each sample, [B, k], for metrics of the whole set.
        """
        counts = self.denominators(batch)
        sums = self(model, batch, {name: torch.ones_like(n) for name, n in counts.items()})
        return {name: (value, counts[name]) for name, value in sums.items()}

    def score(self, rows: NDArray[np.float64]) -> dict[str, float]:
        """The `metrics` that are made of ROWS of all samples, [N, k], in the order of the set; equal on all ranks."""
        return {}

    def examine(self, model: Any, data: Any, micro_batch_size: int) -> dict[str, float]:
        """The `metrics` of a whole set, once per validation, on all ranks. data: None if a trainer was given loaders.

        If it takes long, it calls `self.check()` now and then, equally often on all ranks.
        """
        return {}

    def lengths(self, batch: Batch, seq_len: int) -> tuple[int, int]:
        """Positions of a sample of the batch, padding included: of the input, and of a decoder's target."""
        read, written = (
            batch[name].shape[1] if name in batch and batch[name].ndim == 2 else seq_len
            for name in ("input_ids", "labels")
        )
        return read, written

    def target_ids(self, batch: Batch) -> Tensor | None:
        """The token ids [n] that `loss` predicts, for bits per byte; None if it predicts no text."""
        return None

    def show(self, module: Any, data: Any, config: RunConfig, check: Callable[[], None]) -> list[Shown]:
        """Examples of the model's output, for the screen, samples.txt and the loggers; on all ranks.

        check: called after each token; it may raise to stop.
        """
        return []

    # ---------------------------------------------------------------------------------------------------------- columns

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of metrics.csv besides those of every run, known before the first step."""
        return (*self.terms, *(f"val_{name}" for name in self.terms), *self.metrics)

    @property
    def terms(self) -> tuple[str, ...]:
        """All terms but `loss`."""
        return (*(name for name in self.weights if name != "loss"), *self.reports)


def build_objective(config: RunConfig) -> Objective:
    made: Objective = make("objective", config.objective, **config.objective.arguments(config))
    return made


def n_targets(labels: Tensor) -> Tensor:
    return (labels != IGNORED).sum()


def n_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Number of targets that have the largest logit: logits [..., classes], labels [...]."""
    return ((logits.argmax(-1) == labels) & (labels != IGNORED)).sum()

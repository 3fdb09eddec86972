"""The interface between an objective, the data and the training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from txtrain.data.samples.order import GlobalOrder
from txtrain.data.samples.rows import Rows
from txtrain.data.samples.text import TokenisedText
from txtrain.errors import ConfigError
from txtrain.registry import make, resolve
from txtrain.run_config import RunConfig

ROWS = "rows"  # in `Objective.validate`: numbers of each sample, [B, k], of which `Objective.score` is made
IGNORED = -100  # label of positions without a target, as in Hugging Face

Batch = Mapping[str, Tensor]
Terms = dict[str, Tensor]
Counted = dict[str, tuple[Tensor, Tensor]]
# Float64 [B, k], or [B, D, k] for the D documents in each sample: numbers whose sum over samples gives a metric; the
# last is the count of what it is a mean of.
Statistics = dict[str, Tensor]
Numbers = NDArray[np.float64]
Sums = Mapping[str, Numbers]


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
    moved: frozenset[str] = frozenset()  # those whose weights are no longer as they were read: in checkpoints
    masks: bool = False  # labels of -100 in the data stay: only some tokens are trained
    special_tokens: tuple[str, ...] = ()  # that it needs; missing ones are added at the end of the vocabulary
    decodes: bool = False  # whether some `metrics` need generated answers (`decode`)

    # ------------------------------------------------------------------------------------------------------------- data

    def samples(self, text: TokenisedText) -> Rows:
        """Samples of a text: by default sequences for a causal model."""
        return text.sequences()

    def order(self, n: int, seed: int, overfit_batches: int) -> GlobalOrder | None:
        """The samples that each step reads, of n; None: as many as it trains on, in the order of the data."""
        return None

    # --------------------------------------------------------------------------------------------------------- training

    def meet(self, parallel: Any, tokenizer: Any) -> None:
        """Called before anything is measured: the ranks, and the data's tokenizer, None if there is none."""

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
        sums = self.plain(model, batch, {name: torch.ones_like(n) for name, n in counts.items()})
        return {name: (value, counts[name]) for name, value in sums.items()}

    def plain(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        """The terms in validation, without what only training adds (label smoothing)."""
        return self(model, batch, denominators)

    def score(self, rows: NDArray[np.float64]) -> dict[str, float]:
        """The `metrics` that are made of ROWS of all samples, [N, k], in the order of the set; equal on all ranks."""
        return {}

    def examine(self, model: Any, data: Any, micro_batch_size: int) -> dict[str, float]:
        """The `metrics` of a whole set, once per validation, on all ranks. data: None if a trainer was given loaders.

        If it takes long, it calls `self.check()` now and then, equally often on all ranks.
        """
        return {}

    # ------------------------------------------------------------------------------------------------------- evaluation

    def measure(self, model: Callable[..., Any], batch: Batch, token_bytes: Tensor | None) -> Statistics:
        """What `figures` needs of each sample of the batch. By default of `validate`, by a forward for each sample.

        token_bytes: of each token [V], for bits per byte; None: there is no text.
        """
        rows = [self._of_one(model, one, token_bytes) for one in singles(batch)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _of_one(self, model: Callable[..., Any], batch: Batch, token_bytes: Tensor | None) -> Statistics:
        """[k] each; of ROWS the numbers themselves."""
        counted = dict(self.validate(model, batch))
        rows = {name: value[0].double() for name, (value, _) in counted.items() if name == ROWS}
        counted.pop(ROWS, None)
        ids = self.target_ids(batch)
        if ids is not None and token_bytes is not None and "loss" in counted:
            counted["bits_per_byte"] = counted["loss"][0] / math.log(2), token_bytes[ids].sum()
        return rows | {name: torch.stack([value.double(), n.double()]) for name, (value, n) in counted.items()}

    def decode(self, model: Any, batch: Batch, tokenizer: Any) -> Statistics:
        """The same of answers that are generated for each sample, where it `decodes`."""
        return {}

    def figures(self, sums: Sums) -> dict[str, Numbers]:
        """The metrics from sums of statistics over samples, [..., k] each: [...]. By default means."""
        found = {name: s[..., 0] / np.maximum(s[..., -1], 1.0) for name, s in sums.items()}
        shared = [name for name in self.weights if name not in self.beside]
        if "loss" not in found and all(name in found for name in shared):
            found = {"loss": self.reported(found), **found}
        if self.perplexity and "loss" in found:
            found["perplexity"] = np.exp(np.minimum(found["loss"], 700.0))
        return found

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

    def figure_names(self, text: bool) -> tuple[str, ...]:
        """The names of `figures`. text: the data have bytes."""
        terms = [name for name in self.terms if name not in self.beside]
        perplexity = ["perplexity"] if self.perplexity else []
        bits = ["bits_per_byte"] if text and perplexity else []
        return tuple(dict.fromkeys(("loss", *terms, *self.metrics, *perplexity, *bits)))

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


def singles(batch: Batch) -> Iterator[dict[str, Tensor]]:
    """The samples of a batch, each as a batch of one."""
    for i in range(len(next(iter(batch.values())))):
        yield {name: value[i : i + 1] for name, value in batch.items()}


def stacked(value: Tensor, count: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
    """Statistics of a mean: value and count [B], as [B, 2]; or of each position [B, T], summed over a row, or, with
    document_ids, over each document in it, as [B, D, 2]."""
    both = torch.stack([value.double(), count.double()], -1)
    if both.ndim == 2:
        return both
    if document_ids_BT is None:
        return both.sum(1)
    found = both.new_zeros(len(both), int(document_ids_BT.max()) + 1, 2)
    return found.scatter_add_(1, document_ids_BT[..., None].expand(-1, -1, 2), both)


def of_targets(
    log_probs_BT: Tensor, labels_BT: Tensor, token_bytes: Tensor | None, document_ids_BT: Tensor | None = None
) -> Statistics:
    """`loss`, in nats per target, and `bits_per_byte`: labels are -100 where nothing is predicted."""
    chosen, losses = labels_BT != IGNORED, -log_probs_BT
    found = {"loss": stacked(losses, chosen, document_ids_BT)}
    if token_bytes is not None:
        n_bytes = token_bytes[labels_BT.masked_fill(~chosen, 0)] * chosen
        found["bits_per_byte"] = stacked(losses / math.log(2), n_bytes, document_ids_BT)
    return found


def by_metric(name: str, model: Callable[..., Any], batch: Batch) -> Tensor:
    """Statistics [B, 2] of a user's metric.

    Raises:
        ConfigError: its function returns something else than one or two numbers for each sample.
    """
    made = resolve("metric", name)(model, batch)
    n = len(next(iter(batch.values())))
    value, count = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(value, Tensor) or value.shape != (n,) or (count is not None and count.shape != (n,)):
        said = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"`metrics`: {name} must return a number for each of {n} samples, but returned {said}.")
    return stacked(value, torch.ones_like(value) if count is None else count)

"""A class, several classes or numbers for each row: of a text (BERT, 1810.04805; GPT-1, Radford et al. 2018), an image.

GPT-1's auxiliary loss (section 3.2) is the term `lm_loss` of weight lm_weight: the next tokens of the same texts.
"""

# B batch, T positions, C classes or numbers

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from txtrain.model.head.loss import class_loss, class_losses, n_class_targets
from txtrain.objectives.base import (
    IGNORED,
    ROWS,
    Batch,
    Counted,
    Objective,
    Shown,
    Statistics,
    Terms,
    n_targets,
    stacked,
)
from txtrain.objectives.scores import class_scores, flag_scores, number_scores
from txtrain.run_config import RunConfig

_METRICS = {
    "single": ("accuracy", "f1_macro", "f1_micro", "mcc"), "multi": ("accuracy", "f1_macro", "f1_micro"),
    "regression": ("pearson", "spearman"),
}


class Classes(Objective):
    """A loss per row, of one result of the model. label_smoothing: of a single class, in training alone."""

    inputs: ClassVar[tuple[str, ...]]  # of the batch, which the model reads

    def __init__(self, kind: str = "single", label_smoothing: float = 0.0) -> None:
        self.kind, self.label_smoothing = kind, label_smoothing

    def given(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in self.inputs if name in batch}

    def denominators(self, batch: Batch) -> Terms:
        return {"loss": n_class_targets(self.kind, batch["labels"])}

    def __call__(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        output = self.output(model, batch, denominators)
        smoothed = self.label_smoothing
        loss = class_loss(self.kind, output.logits, batch["labels"], denominators["loss"], smoothed)
        return self.losses(output, loss)

    def output(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Any:
        return model(**self.given(batch))

    def losses(self, output: Any, loss: Tensor) -> Terms:
        return {"loss": loss}

    def validate(self, model: Callable[..., Any], batch: Batch) -> Counted:
        counts = self.denominators(batch)
        ones = {name: torch.ones_like(n) for name, n in counts.items()}
        output = self.output(model, batch, ones)
        loss = class_loss(self.kind, output.logits, batch["labels"], ones["loss"])
        found = {name: (value, counts[name]) for name, value in self.losses(output, loss).items()}
        return {**found, **self.measured(output.logits, batch["labels"], counts["loss"])}

    def measured(self, logits_BC: Tensor, labels: Tensor, count: Tensor) -> Counted:
        """Sums and counts for the metrics."""
        raise NotImplementedError

    def measure(self, model: Callable[..., Any], batch: Batch, token_bytes: Tensor | None) -> Statistics:
        logits_BC = model(**self.given(batch)).logits
        loss = stacked(*class_losses(self.kind, logits_BC, batch["labels"]))
        return {"loss": loss, **self.of_each(logits_BC, batch["labels"])}

    def of_each(self, logits_BC: Tensor, labels: Tensor) -> Statistics:
        """Statistics of each row for the metrics."""
        raise NotImplementedError


class Classification(Classes):
    """Of texts: cross-entropy of the class, binary cross-entropy of each class, or the squared error of numbers.

    Metrics are of all validation rows at once, whatever the batches and the ranks.
    """

    inputs = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(
        self, kind: str = "single", label_smoothing: float = 0.0, lm_weight: float = 0.5, lm: bool = False,
        marks: bool = False,
    ) -> None:
        super().__init__(kind, label_smoothing)
        self.metrics, self.lm = _METRICS[kind], lm
        self.special_tokens = ("[CLS]", "[SEP]") if marks else ()
        if lm:
            self.weights, self.beside = {"loss": 1.0, "lm_loss": lm_weight}, ("lm_loss",)

    def denominators(self, batch: Batch) -> Terms:
        words = {"lm_loss": n_targets(self._words(batch)[:, 1:])} if self.lm else {}
        return {**super().denominators(batch), **words}

    def output(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Any:
        if not self.lm:
            return super().output(model, batch, denominators)
        return model(
            **self.given(batch), lm_targets=self._words(batch), lm_items_in_batch=denominators["lm_loss"]
        )

    def losses(self, output: Any, loss: Tensor) -> Terms:
        return {"loss": loss, **({"lm_loss": output.lm_loss} if self.lm else {})}

    @staticmethod
    def _words(batch: Batch) -> Tensor:
        """The tokens, as targets of the auxiliary loss."""
        return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)

    def measured(self, logits_BC: Tensor, labels: Tensor, count: Tensor) -> Counted:
        return {ROWS: (self._rows(logits_BC, labels), count)}

    def _rows(self, logits_BC: Tensor, labels: Tensor) -> Tensor:
        if self.kind == "single":
            return torch.stack((logits_BC.argmax(-1), labels), 1)
        found = (logits_BC > 0) if self.kind == "multi" else logits_BC
        return torch.cat((found.double(), labels.double().view(found.shape)), 1)

    def measure(self, model: Callable[..., Any], batch: Batch, token_bytes: Tensor | None) -> Statistics:
        if self.lm:  # the model sums the auxiliary loss over all rows of a forward
            return Objective.measure(self, model, batch, token_bytes)
        return super().measure(model, batch, token_bytes)

    def of_each(self, logits_BC: Tensor, labels: Tensor) -> Statistics:
        return {ROWS: self._rows(logits_BC, labels).double()}

    def score(self, rows: NDArray[np.float64]) -> dict[str, float]:
        found, truth = np.split(rows, 2, axis=1)
        if self.kind == "single":
            return class_scores(found[:, 0].astype(int), truth[:, 0].astype(int))
        return flag_scores(found, truth) if self.kind == "multi" else number_scores(found, truth)

    def show(self, module: Any, data: Any, config: RunConfig, check: Callable[[], None]) -> list[Shown]:
        made, weight = [], next(module.model.parameters())
        names = config.model.head.label_names
        for batch in data.examples(config.sample.n, 1):
            check()
            given = {name: value.to(weight.device) for name, value in self.given(batch).items()}
            logits_C = module.model(**given).logits[0].float()
            ids = batch["input_ids"][0][batch["attention_mask"][0] != 0].tolist()
            parts = itertools.groupby(ids, key=data.tokenizer.special_ids().__contains__)
            text = " / ".join(data.tokenizer.decode(list(part)) for special, part in parts if not special)
            answer = f"{said(self.kind, batch['labels'][0], names)}, predicted {self._predicted(logits_C, names)}"
            made.append(Shown(text, answer))
        return made

    def _predicted(self, logits_C: Tensor, names: tuple[str, ...]) -> str:
        if self.kind != "single":
            return said(self.kind, logits_C if self.kind == "regression" else (logits_C > 0).float(), names)
        share, predicted = logits_C.softmax(-1).max(-1)
        return f"{said(self.kind, predicted, names)} ({float(share):.2f})"


def said(kind: str, label: Tensor, names: tuple[str, ...]) -> str:
    """A label in words: the class's name, the names of several, or numbers."""
    if kind == "regression":
        return ", ".join(f"{number:.4g}" for number in label.flatten().tolist())
    if kind == "single":
        return names[int(label)] if names else str(int(label))
    return ", ".join(name for name, flag in zip(names, label.tolist(), strict=True) if flag) or "none"

"""Predict the next token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from txtrain.model.mtp import further_targets
from txtrain.objectives.base import IGNORED, Batch, Objective, Shown, Statistics, Terms, n_targets, of_targets
from txtrain.objectives.continuations import continuations
from txtrain.run_config import RunConfig


class CausalLM(Objective):
    """Cross-entropy of token t + 1 given tokens 0..t, in nats per token, over all targets of the global batch.

    mtp_depth: also predict tokens t + 2, t + 3, ..., as terms `mtp_loss`, `mtp_loss_2`, ... of total weight mtp_weight.
    counts_tokens: pass the padding mask, for a model that counts tokens (`ModelShape.counts_tokens`). Others need none,
    since no trained token attends to later ones, and without a mask faster kernels apply.
    """

    perplexity = True
    masks = True
    counts_tokens = False

    def __init__(self, mtp_weight: float = 0.3, mtp_depth: int = 0, counts_tokens: bool = False) -> None:
        self.counts_tokens = counts_tokens
        self.beside = tuple("mtp_loss" if k == 1 else f"mtp_loss_{k}" for k in range(1, mtp_depth + 1))
        self.weights = {"loss": 1.0, **dict.fromkeys(self.beside, mtp_weight / max(mtp_depth, 1))}

    def denominators(self, batch: Batch) -> Terms:
        labels, documents = batch["labels"], batch.get("document_ids")
        targets = [labels[:, 1:], *(further_targets(labels, documents, k + 1) for k in range(len(self.beside)))]
        return dict(zip(("loss", *self.beside), map(n_targets, targets), strict=True))

    def __call__(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        output = model(
            input_ids=batch["input_ids"],
            document_ids=batch.get("document_ids"),
            labels=batch["labels"],
            num_items_in_batch=denominators["loss"],
            **({"attention_mask": batch.get("attention_mask")} if self.counts_tokens else {}),
            **self._of_further(denominators),
            return_logits=False,  # [B, T, V] would be the largest tensor of the step
        )
        return {"loss": output.loss, **dict(zip(self.beside, output.mtp_losses or (), strict=True))}

    def _of_further(self, denominators: Terms) -> dict[str, Any]:
        """Only for a model with MTP: others, such as a user's own, need not have the argument."""
        return {"mtp_items_in_batch": [denominators[name] for name in self.beside]} if self.beside else {}

    def measure(self, model: Callable[..., Any], batch: Batch, token_bytes: Tensor | None) -> Statistics:
        labels, documents = batch["labels"].clone(), batch.get("document_ids")
        labels[:, 0] = IGNORED  # no token precedes it
        output = model(
            input_ids=batch["input_ids"], document_ids=documents, labels=labels,
            attention_mask=batch.get("attention_mask") if self.counts_tokens else None,
            return_logits=False, return_log_probs=True,
        )
        return of_targets(output.log_probs, labels, token_bytes, documents)

    def target_ids(self, batch: Batch) -> Tensor:
        labels = batch["labels"][:, 1:]
        return labels[labels != IGNORED]

    def show(self, module: Any, data: Any, config: RunConfig, check: Callable[[], None]) -> list[Shown]:
        return continuations(module, data, config, check)

"""Predict the next token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from txtrain.objectives.base import Batch, Objective, Terms

IGNORED = -100  # a label that is no target, as in Hugging Face


class CausalLM(Objective):
    """Cross-entropy of token t + 1 given tokens 0..t, in nats a token, over all targets of the global batch."""

    perplexity = True

    def denominators(self, batch: Batch) -> Terms:
        return {"loss": (batch["labels"][:, 1:] != IGNORED).sum().clamp(min=1)}  # a batch without a target has loss 0, not NaN

    def __call__(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        output = model(
            input_ids=batch["input_ids"],
            document_ids=batch.get("document_ids"),
            labels=batch["labels"],
            num_items_in_batch=denominators["loss"],
            return_logits=False,  # [B, T, V] at once would be the largest tensor of the step
        )
        return {"loss": output.loss}

    def target_ids(self, batch: Batch) -> Tensor:
        labels = batch["labels"][:, 1:]
        return labels[labels != IGNORED]

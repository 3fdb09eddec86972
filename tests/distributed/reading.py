"""`imports=[tests.distributed.reading]`: an objective that reads a second model."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping
from typing import Any

import txtrain
from txtrain.objectives.base import IGNORED, Batch, Terms
from txtrain.objectives.causal_lm import CausalLM
from txtrain.objectives.config import CausalLMConfig


@txtrain.component("objective", "toward")
class Toward(CausalLM):
    """Beside the loss the cross-entropy to a teacher's distribution, as a term of its own."""

    weights: Mapping[str, float] = {"loss": 1.0, "to_teacher": 1.0}

    @dc.dataclass(frozen=True, kw_only=True)
    class Config(CausalLMConfig):
        teacher: str = ""

        @property
        def models(self) -> Mapping[str, str]:
            return {"teacher": self.teacher}

        def arguments(self, config: Any) -> dict[str, Any]:
            return {}

    def __init__(self, teacher: str = "", mtp_weight: float = 0.0) -> None:
        pass

    def denominators(self, batch: Batch) -> Terms:
        found = super().denominators(batch)
        return found | {"to_teacher": found["loss"]}

    def __call__(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        asked = {"input_ids": batch["input_ids"], "document_ids": batch.get("document_ids")}
        labels = batch["labels"]
        output = model(**asked, labels=labels, num_items_in_batch=denominators["loss"])
        wanted = self.models["teacher"](**asked).logits[:, :-1].softmax(-1)
        assert not wanted.requires_grad
        each = -(wanted * output.logits[:, :-1].log_softmax(-1)).sum(-1)
        distance = each.masked_fill(labels[:, 1:] == IGNORED, 0.0).sum() / denominators["to_teacher"]
        return {"loss": output.loss, "to_teacher": distance}

"""DPO's keys. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from txtrain.objectives.base_config import ObjectiveConfig, Shapes
from txtrain.registry import config, knob
from txtrain.run_config import RunConfig


@config
class DPOConfig(ObjectiveConfig):
    """Direct preference optimisation (2305.18290), and IPO (2310.12036)."""

    topologies: ClassVar = ("decoder",)
    heads: ClassVar = ("lm",)
    reads: ClassVar = ("preferences",)
    alone: ClassVar = False

    beta: float = knob(0.1, above=0)  # how much a divergence from the reference costs; 2310.12036 calls it tau
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # sigmoid: DPO; ipo: a squared distance, which does not saturate
    # probability that a preference is the wrong way round (sigmoid alone), in training, not in validation
    label_smoothing: float = knob(0.0, at_least=0, below=0.5)
    # weight of the cross-entropy of the preferred answers, in nats per token (2404.19733, 2404.18922)
    sft_weight: float = knob(0.0, at_least=0)
    # of the weights with which the run begins: read at each step, or their log-probabilities, computed before the first
    reference: Literal["initial", "cached"] = "initial"

    reads_start: ClassVar = True

    @property
    def start(self) -> str | None:
        return "reference" if self.reference == "initial" else None

    def batch_shapes(self, config: RunConfig, n: int) -> Shapes:
        cached = {"reference_log_probs": (n, max(1, config.seq_len // 4), 2)} if self.reference == "cached" else {}
        return super().batch_shapes(config, n) | cached

    def check(self) -> Iterator[str]:
        if self.label_smoothing and self.loss == "ipo":
            given = self.label_smoothing
            yield f"`objective.label_smoothing` must be 0 with objective.loss=ipo, but is {given} instead. Nearest: 0."

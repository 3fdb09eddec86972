"""Load balancing of experts: counts over the global batch, and the update of their biases after each step.

DeepSeek-V3's balancing without an auxiliary loss (2408.15664; 2412.19437, section 2.1.2): an expert visited less than
the mean gets a larger bias on the choice, one visited more a smaller one. The bias does not enter an expert's weight,
so no gradient competes with the language model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from txtrain.model.config import ModelConfig
from txtrain.model.ffn.moe import ScaleOf
from txtrain.model.transformer import Transformer

COUNTS = "expert_counts"  # last part of the names in a record
MAX_LOAD = "moe_max_load"


class Observed:
    """A model that sums how often its experts were chosen, from its outputs: recomputed forwards do not count.

    It also remembers what scales the auxiliary losses of its forwards, until their `total` is made.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self._model = model
        self.counts: dict[str, Tensor] = {}  # by the layer's name, [E]
        self._scales: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._model(*args, **kwargs)
        for name, value in (output.aux or {}).items():
            layer, _, kind = name.rpartition(".")
            if kind == COUNTS:
                self.counts[layer] = self.counts[layer] + value if layer in self.counts else value
        if (scale := getattr(output, "loss_scale", None)) is not None:
            self._scales.append(scale)
        return output

    def total(self, objective: Any, terms: Mapping[str, Tensor], batch: Any, denominators: Mapping[str, Tensor]) -> Any:
        """What an objective minimises, made of this model's outputs. It weighs the experts' auxiliary losses by the
        batch's share of the targets: an objective may compute its loss of logits or log-probabilities. A loss that the
        forward computed does so itself, and afterwards."""
        total, scales, self._scales = objective.total(terms), self._scales, []
        for scale in scales if total.requires_grad else ():
            name = next(iter(objective.weights))
            (total,) = ScaleOf.apply(scale, objective.denominators(batch)[name] / denominators[name], total)
        return total

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@torch.no_grad()
def update(model: nn.Module, counts: Mapping[str, Tensor]) -> None:
    """Move the biases of each trained mixture by its rate, after the optimizer's step: those of an adapter's base stay.
    counts: of the global batch."""
    for layer, counts_E in counts.items():
        mixture: Any = model.get_submodule(f"{layer}.ffn")
        held = not isinstance(model, Transformer) or model.kept is None or f"{layer}.ffn.balance_bias" in model.kept
        if held and mixture.bias_update_rate and any(p.requires_grad for p in mixture.parameters()):
            mixture.balance_bias += mixture.bias_update_rate * torch.sign(counts_E.mean() - counts_E)


def measured(counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Visits of the most visited expert over the mean, averaged over the layers (1: even); empty without mixtures."""
    loads = [counts_E.max() / counts_E.mean() for counts_E in counts.values()]
    return {MAX_LOAD: torch.stack(loads).mean()} if loads else {}


def columns(model: ModelConfig) -> tuple[str, ...]:
    """Further columns of metrics.csv."""
    return (MAX_LOAD,) if model.ffn.n_experts else ()

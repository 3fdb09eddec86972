"""Experts that stay evenly visited: counts over the global batch, and the rule that moves their biases, once a step.

DeepSeek-V3's balancing without an auxiliary loss (2408.15664; 2412.19437, section 2.1.2): an expert that was visited less than the mean
gets a larger bias on the choice, one that was visited more a smaller one. The bias never enters an expert's weight, so that no
gradient pulls against the language model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from txtrain.model.config import ModelConfig

COUNTS = "expert_counts"  # the last part of the names under which layers record them
MAX_LOAD = "moe_max_load"


class Observed:
    """A model that is called as it is, and adds up how often its experts were chosen over several forwards.

    The counts come from the outputs, not from hooks or buffers: a forward that is repeated for its backward (activation checkpointing)
    does not count twice.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self._model = model
        self.counts: dict[str, Tensor] = {}  # by the layer's name, [E]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._model(*args, **kwargs)
        for name, value in (output.aux or {}).items():
            layer, _, kind = name.rpartition(".")
            if kind == COUNTS:
                self.counts[layer] = self.counts[layer] + value if layer in self.counts else value
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@torch.no_grad()
def update(model: nn.Module, counts: Mapping[str, Tensor]) -> None:
    """Move the bias of every mixture of which something is trained by its rate, after the optimizer's step. counts: those of the
    whole global batch."""
    for layer, counts_E in counts.items():
        mixture: Any = model.get_submodule(f"{layer}.ffn")
        if mixture.bias_update_rate and any(p.requires_grad for p in mixture.parameters()):
            mixture.balance_bias += mixture.bias_update_rate * torch.sign(counts_E.mean() - counts_E)


def measured(counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How often the most visited expert was chosen, as a multiple of the mean: 1 is even. Averaged over the layers; empty without any."""
    if not counts:
        return {}
    return {MAX_LOAD: torch.stack([counts_E.max() / counts_E.mean() for counts_E in counts.values()]).mean()}


def columns(model: ModelConfig) -> tuple[str, ...]:
    """What metrics.csv has beside the columns of every run."""
    return (MAX_LOAD,) if model.ffn.n_experts else ()

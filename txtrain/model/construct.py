"""From an option's config to its module, and what the module alone tells. Torch comes with first use.

A component's constructor gets its own knobs, resolved (`config.arguments`), and whatever of the model's values it names:
dim, n_heads, n_layers, vocab_size, max_seq_len, dropout, layer (its index), causal, norm (a function of a size).
"""

from __future__ import annotations

import dataclasses as dc
import inspect
from collections.abc import Callable
from typing import Any

from txtrain.model.shape import ModelShape
from txtrain.registry import resolve


def make_norm(config: ModelShape) -> Callable[[int], Any]:
    return lambda size: construct("norm", config.norm, config, dim=size)


def construct(axis: str, component: Any, model: ModelShape, layer: int = 0, **override: Any) -> Any:
    """The module of one option."""
    cls = resolve(axis, component.type)
    shared: dict[str, Any] = {
        "dim": model.dim,
        "n_heads": model.n_heads,
        "n_layers": model.n_layers,
        "vocab_size": model.vocab_size,
        "max_seq_len": model.max_seq_len,
        "dropout": model.dropout,
        "layer": layer,
        "causal": model.topology != "encoder",
    }
    if axis != "norm":
        shared["norm"] = make_norm(model)
    named = inspect.signature(cls).parameters
    arguments = {k: v for k, v in (shared | override).items() if k in named} | component.arguments(model, layer)
    return cls(**arguments | {k: v for k, v in override.items() if k in arguments})


def count_component(component: Any, model: ModelShape, layer: int) -> int:
    """Parameters of an option that has no closed form."""
    import torch

    axis = next(name for name, c in model.components() if c is component or c == component)
    with torch.device("meta"):
        module = construct(axis, component, model, layer)
    return sum(p.numel() for p in module.parameters())


def count_norm(norm: Any, size: int) -> int:
    """Parameters of a norm that has no closed form."""
    import torch

    knobs = {f.name: getattr(norm, f.name) for f in dc.fields(norm) if f.name != "type"}
    with torch.device("meta"):
        module = resolve("norm", norm.type)(dim=size, **knobs)
    return sum(p.numel() for p in module.parameters())

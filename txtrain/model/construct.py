"""From an option's config to its module. Torch is imported on first use.

A component's constructor gets its own knobs (`config.arguments`), and those of the model's values that it names:
dim, n_heads, n_layers, vocab_size, max_seq_len, dropout, layer (its index), causal, norm (a function of a size).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from txtrain.model.shape import ModelShape
from txtrain.registry import BASES, call, resolve


def make_norm(config: ModelShape) -> Callable[[int], Any]:
    return lambda size: construct("norm", config.norm, config, dim=size)


def construct(axis: str, component: Any, model: ModelShape, layer: int = 0, **override: Any) -> Any:
    """The module of one option."""
    names = ("dim", "n_heads", "n_layers", "vocab_size", "max_seq_len", "dropout")
    shared: dict[str, Any] = {name: getattr(model, name) for name in names}
    shared |= {"layer": layer, "causal": model.topology != "encoder"}
    if axis != "norm":
        shared["norm"] = make_norm(model)
    knobs = component.arguments(model, layer)
    return call(axis, component, shared | knobs | override, knobs)


_counted: dict[tuple[Any, str], int] = {}


def count_parameters(component: Any, model: ModelShape, layer: int = 0, **override: Any) -> int:
    """Parameters of an option without closed forms, built on the meta device once for each model and layer."""
    import torch

    from txtrain.model.shapes_only import shapes_only

    axis = next(axis for axis, base in BASES.items() if isinstance(component, base))
    key = (resolve(axis, component.type), repr((component, model, layer, override)))
    if key not in _counted:
        with shapes_only():
            module = construct(axis, component, model, layer, **override)
        _counted[key] = sum(p.numel() for p in module.parameters()) if isinstance(module, torch.nn.Module) else 0
    return _counted[key]

"""An optimizer's groups and temporaries for the parameters that a rank holds. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from txtrain.optim.config import Depths, Held, OptimizerConfig

# The order of modules, and so of parameters in the optimizer: a stable sort of the forward's order.
MODULES = ("position", "blocks", "final_norm", "embedding", "head", "encoder", "encoder_embedding", "mtp")
SUBLAYERS = ("attention", "attention_residual", "ffn", "ffn_residual", "cross_attention", "cross_attention_residual")


def made(config: OptimizerConfig, held: Sequence[Held], size: int) -> int:
    """Peak bytes of temporaries in an update, beside states and gradients: groups are updated one after the other."""
    return max((config.update_bytes(group, size) for group in grouped(config, held)), default=0)


def grouped(config: OptimizerConfig, held: Sequence[Held]) -> list[list[Held]]:
    """The optimizer's groups, as in `txtrain.optim.groups`."""
    groups: dict[tuple[tuple[str, Any], ...], list[Held]] = {}
    depths = Depths.of(h.name for h in held)
    for h in sorted(held, key=lambda h: registered(h.name)):
        groups.setdefault(tuple(sorted(config.settings(h.name, h.shape, depths).items())), []).append(h)
    return list(groups.values())


def registered(name: str) -> tuple[int, ...]:
    """Sort key of a parameter by its module's place in the model."""
    first, *rest = name.split(".")
    within = rest if first == "encoder" else [first, *rest]
    number = int(within[1]) if within[0] in ("blocks", "mtp") else 0
    sublayer = next((i for i, name in enumerate(SUBLAYERS) if name in within[2:4]), -1)
    return (MODULES.index(first), MODULES.index(within[0]) if first == "encoder" else 0, number, sublayer)

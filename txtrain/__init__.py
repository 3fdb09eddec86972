"""txtrain: train any transformer by composing its parts. Light to import: torch comes with first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from txtrain.errors import ConfigError
from txtrain.registry import component

if TYPE_CHECKING:
    from txtrain.composition import compose
    from txtrain.data.module import DataModule
    from txtrain.generation import generate
    from txtrain.hf.saving import save_pretrained
    from txtrain.loading import load_pretrained
    from txtrain.model.build import build_model
    from txtrain.module import LitModule
    from txtrain.places import families
    from txtrain.planning import plan
    from txtrain.run import train

__version__ = "0.1.0"

_LAZY = {  # where each name stands; imported when it is first asked for
    "DataModule": "txtrain.data.module",
    "LitModule": "txtrain.module",
    "build_model": "txtrain.model.build",
    "compose": "txtrain.composition",
    "families": "txtrain.places",
    "generate": "txtrain.generation",
    "load_pretrained": "txtrain.loading",
    "plan": "txtrain.planning",
    "save_pretrained": "txtrain.hf.saving",
    "train": "txtrain.run",
}

__all__ = [
    "ConfigError",
    "DataModule",
    "LitModule",
    "build_model",
    "component",
    "compose",
    "families",
    "generate",
    "load_pretrained",
    "plan",
    "save_pretrained",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'txtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

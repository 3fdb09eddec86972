"""txtrain: train any transformer by composing its parts. Light to import: torch comes with first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from txtrain.errors import ConfigError
from txtrain.registry import component

if TYPE_CHECKING:
    from txtrain.api import build_model, compose, families, generate, load_pretrained, plan, save_pretrained, train
    from txtrain.data.module import DataModule
    from txtrain.module import LitModule

__version__ = "0.1.0"

_LAZY = {
    "build_model": "txtrain.api",
    "compose": "txtrain.api",
    "families": "txtrain.api",
    "generate": "txtrain.api",
    "load_pretrained": "txtrain.api",
    "save_pretrained": "txtrain.api",
    "plan": "txtrain.api",
    "train": "txtrain.api",
    "LitModule": "txtrain.module",
    "DataModule": "txtrain.data.module",
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

"""txtrain: train any transformer by composing its parts. Light to import: everything comes with first use."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from typing import Any

    from txtrain.composition import compose
    from txtrain.data.module import DataModule
    from txtrain.errors import ConfigError
    from txtrain.generation import generate
    from txtrain.hf.saving import save_pretrained
    from txtrain.loading import load_pretrained
    from txtrain.model.build import build_model
    from txtrain.module import LitModule
    from txtrain.places import families
    from txtrain.planning import plan
    from txtrain.registry import component
    from txtrain.run import train

__version__ = "0.1.0"

_LAZY = {  # where each name stands; imported when it is first asked for
    "ConfigError": "txtrain.errors",
    "DataModule": "txtrain.data.module",
    "LitModule": "txtrain.module",
    "build_model": "txtrain.model.build",
    "component": "txtrain.registry",
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
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'txtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

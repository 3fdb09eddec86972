"""txtrain: train any transformer by composing its parts. Light to import: everything comes with first use."""

from __future__ import annotations

from txtrain.ground import torchmetrics_on_demand

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from typing import Any

    from txtrain.checkpoint.load import load_pretrained as load_pretrained
    from txtrain.cli.jobs import compose as compose
    from txtrain.cli.plan import plan as plan
    from txtrain.config.paths import families as families
    from txtrain.config.plugins import component as component
    from txtrain.errors import ConfigError as ConfigError
    from txtrain.hf.save import save_pretrained as save_pretrained
    from txtrain.hf.trainer import build_model as build_model
    from txtrain.model.generation import generate as generate
    from txtrain.model.transformer import log_probs as log_probs
    from txtrain.training.data_module import DataModule as DataModule
    from txtrain.training.evaluation import evaluate as evaluate
    from txtrain.training.module import LitModule as LitModule
    from txtrain.training.run import train as train

__version__ = "0.1.0"

_LAZY = {  # where each name stands; imported when it is first asked for
    "ConfigError": "txtrain.errors",
    "DataModule": "txtrain.training.data_module",
    "LitModule": "txtrain.training.module",
    "build_model": "txtrain.hf.trainer",
    "component": "txtrain.config.plugins",
    "compose": "txtrain.cli.jobs",
    "evaluate": "txtrain.training.evaluation",
    "families": "txtrain.config.paths",
    "generate": "txtrain.model.generation",
    "load_pretrained": "txtrain.checkpoint.load",
    "log_probs": "txtrain.model.transformer",
    "plan": "txtrain.cli.plan",
    "save_pretrained": "txtrain.hf.save",
    "train": "txtrain.training.run",
}

__all__ = [*_LAZY]

torchmetrics_on_demand.install()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'txtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

"""What is minimised: a batch becomes named terms, each a sum over the global batch divided by its own denominator.

Configs are read without torch: the classes come with first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from txtrain.objectives.base import Batch, Objective, Terms

__all__ = ["Batch", "Objective", "Terms"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from txtrain.objectives import base

        return getattr(base, name)
    raise AttributeError(f"module 'txtrain.objectives' has no attribute {name!r}")

"""What is minimised: a batch becomes named terms, each a sum over the global batch divided by its own denominator."""

from txtrain.objectives.base import Batch, Objective, Terms

__all__ = ["Batch", "Objective", "Terms"]

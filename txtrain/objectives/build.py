"""From a run's configuration to its objective."""

from __future__ import annotations

from txtrain.config.schema import Train
from txtrain.objectives.base import Objective
from txtrain.registry import make


def build_objective(config: Train) -> Objective:
    made: Objective = make("objective", config.objective, **config.objective.arguments(config))
    return made

"""From a run's configuration to its objective."""

from __future__ import annotations

from txtrain.objectives.base import Objective
from txtrain.registry import make
from txtrain.run_config import RunConfig


def build_objective(config: RunConfig) -> Objective:
    made: Objective = make("objective", config.objective, **config.objective.arguments(config))
    return made

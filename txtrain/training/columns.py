"""The columns of a run's metrics.csv, and the keys that name one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from txtrain.config.schema import Train
from txtrain.errors import ConfigError, hint
from txtrain.model.ffn import balancing
from txtrain.monitor.metrics_csv import COLUMNS
from txtrain.training.tasks import Task


def columns_of(config: Train, columns: Sequence[str], data: Any, tasks: Sequence[Task]) -> tuple[str, ...]:
    """Those of metrics.csv, apart from layers'."""
    measured = (*config.metrics, *(name for task in tasks for name in task.columns))
    return (*COLUMNS, *columns, *balancing.columns(config.model), *data.columns, *measured)


def check_metrics(config: Train, columns: Sequence[str]) -> None:
    """Refuse a metric of save or trainer.stop_after that the run does not measure.

    Raises:
        ConfigError: names the nearest.
    """
    asked = {"save.metric": config.save.metric}
    if config.trainer.stop_after.patience is not None:
        asked["trainer.stop_after.metric"] = config.trainer.stop_after.metric
    if wrong := [
        f"`{key}` must be a column of metrics.csv in this run, but is {name} instead.{hint(name, columns)}"
        for key, name in asked.items() if name not in columns
    ]:
        raise ConfigError(*wrong)

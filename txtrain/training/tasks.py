"""`eval_tasks`: further sets that validation evaluates, prepared once at the start of a run."""

from __future__ import annotations

import dataclasses as dc
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from txtrain.config.of_checkpoint import fitted
from txtrain.config.schema import Train
from txtrain.config.schema_of_trained import Evaluate
from txtrain.data.samples.rows import Rows
from txtrain.data.sources.source import classified
from txtrain.errors import ConfigError
from txtrain.objectives.base import Objective, build_objective
from txtrain.parallel.one_process import OneProcess
from txtrain.training.data_module import DataModule
from txtrain.training.evaluation import Reader, of_sets


@dc.dataclass(frozen=True)
class Task:
    """A set and what is measured on it; `sets` are its parts by name."""

    name: str
    objective: Objective
    data: DataModule
    sets: Mapping[str, Rows]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(f"{name}/{self.name}" for name in self.objective.figure_names(self.data.token_bytes is not None))

    def figures(
        self, model: Any, parallel: OneProcess, device: torch.device, size: int, check: Callable[[], None]
    ) -> dict[str, float]:
        """METRIC/NAME -> value, on all ranks the same. check: called after each forward; may raise to stop."""
        sizes = None if self.data.token_bytes is None else torch.as_tensor(self.data.token_bytes).to(device)
        self.objective.meet(parallel, self.data.tokenizer)
        reader = Reader(model, self.objective, parallel, device, sizes, self.data.tokenizer, size)
        found = of_sets(reader, self.sets, 0, 0, lambda done, n: check())
        values = {f"{name}/{self.name}": one.value for name, one in found.items()}
        return {name: values[name] for name in self.columns if name in values}


def prepare_tasks(config: Train, data: DataModule, parallel: OneProcess) -> list[Task]:
    """The tasks of a run, with its tokenizer.

    Raises:
        ConfigError: a set cannot be read, or the model cannot be measured on it.
    """
    if not config.eval_tasks:
        return []
    with tempfile.TemporaryDirectory() as folder:
        if data.tokenizer is not None:
            data.tokenizer.save(folder)
        made = [_task(name, config, data, Path(folder)) for name in config.eval_tasks]
        for task in made:
            parallel.in_turn(lambda task=task: _told(task.name, task.data.prepare))  # type: ignore[misc]
            parallel.agree({f"the fingerprint of eval_tasks.{task.name}": task.data.fingerprint})
    return [dc.replace(task, sets=task.data.sets) for task in made]


def _task(name: str, config: Train, data: DataModule, tokenizer: Path) -> Task:
    one = config.eval_tasks[name]
    if one.sample_kind != "images" and one.tokenizer == "train":
        if data.tokenizer is None:
            raise ConfigError(f"`eval_tasks.{name}.tokenizer` must be given: data={config.data.type} has none.")
        one = dc.replace(one, tokenizer=str(tokenizer))
    one = dc.replace(one, cache_dir=one.cache_dir or config.data.cache_dir)
    if one.sample_kind != "images":
        one = dc.replace(one, seq_len=one.seq_len or config.data.seq_len)
    values = {f.name: getattr(config, f.name) for f in dc.fields(Train)}
    asked = Evaluate(**values | {"data": one, "eval_tasks": {}})
    settled = _told(name, lambda: classified(fitted(asked, config.model)))
    objective = build_objective(settled)
    return Task(name, objective, DataModule(settled, "", objective), {})


def _told(name: str, do: Callable[[], Any]) -> Any:
    """The result; errors about `data` name the task."""
    try:
        return do()
    except ConfigError as e:
        raise ConfigError(*(p.replace("`data", f"`eval_tasks.{name}", 1) for p in e.problems)) from e

"""The loggers of a run, each called in a thread of its own; one line of the callback reports an event to all."""

from __future__ import annotations

import dataclasses as dc
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from txtrain.checkpoint.run_folder import RunFolder
from txtrain.config.loggers import TENSORBOARD
from txtrain.config.schema import Train
from txtrain.config.targets import WANDB, class_of, instances
from txtrain.ground.convert import plain
from txtrain.monitor.loggers.line import Line, within
from txtrain.monitor.loggers.sinks import Sink, TensorBoard
from txtrain.objectives.base import Shown
from txtrain.planning.figures import plan

Say = Callable[[str], None]
_MAKING, _UPLOAD = 120.0, 3600.0  # seconds allowed for making a logger; for a checkpoint, which it may upload
_LIGHTNING_WANDB = "lightning.pytorch.loggers.WandbLogger"
_CALLED = ("log_metrics", "log_hyperparams", "log_graph", "after_save_checkpoint")  # by Lightning and by callbacks
_OURS = ("save", "finalize")  # ignored when Lightning calls them: `Loggers.close` ends the run
_CHANGING = ("status", "step", "ended", "data_order_hash")  # of run.json
_PLAN = (
    *("n_params", "n_active_params", "n_trained_params", "tokens", "steps"),
    *("flops_per_token", "flops_per_sample", "flops", "flops_missing"),
    *("memory", "memory_by_part", "memory_missing"),
)


class Loggers:
    """Passes a run's events to all loggers. Nothing here waits or raises.

    Args:
        sinks: by the loggers' names.
        told: the configuration and facts of the run, passed to each first.
        say: prints that a logger fails or is slow, or its address.
    """

    def __init__(
        self, sinks: Mapping[str, Sink] | None = None, told: Mapping[str, Any] | None = None, say: Say = print
    ) -> None:
        self._lines = [(sink, Line(name, partial(sink.open, told or {}), say)) for name, sink in (sinks or {}).items()]
        for sink, line in self._lines:
            _behind(sink.logger, line)

    @property
    def lightning(self) -> list[Any]:
        """The Lightning loggers, for lightning.Trainer, which asks each for its `experiment`."""
        return [sink.logger for sink, _ in self._lines if sink.has_experiment]

    def row(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._tell(lambda sink: partial(sink.row, step, metrics))

    def samples(self, step: int, tokens: int, shown: Sequence[Shown]) -> None:
        self._tell(lambda sink: partial(sink.samples, step, tokens, shown))

    def checkpoint(self, path: Path, step: int, order_hash: str, best: bool) -> None:
        self._tell(lambda sink: partial(sink.checkpoint, path, step, order_hash, best), patience=_UPLOAD)

    def close(self, status: str) -> None:
        """Close all; a second call does nothing. status: complete, preempted or failed."""
        lines, self._lines = self._lines, []
        for sink, line in lines:
            line.close(partial(sink.close, status), sink.patience(status))

    def _tell(self, event: Callable[[Sink], Callable[[], object]], patience: float | None = None) -> None:
        for sink, line in self._lines:
            line.put(event(sink), patience)


def make_loggers(config: Train, place: RunFolder, say: Say, planned: int | None) -> Loggers:
    """Make the loggers.

    Args:
        planned: the ranks for which they are told what `plan` says of the run; None, for a model that is not
            config.model's: they are not.

    Raises:
        ConfigError: the arguments of one do not fit it.
    """
    sinks: dict[str, Sink] = {}
    for name, node in config.logger.items():
        try:
            sinks[name] = within(_MAKING, partial(_sink, config, place, say, name, dict(node)))
        except TimeoutError as e:
            say(f"logger {name} cannot be made ({e}): it is dropped. The training goes on.")
    if not sinks:
        return Loggers()
    run = {name: value for name, value in place.facts.items() if name not in _CHANGING}
    figures = {} if planned is None else {"plan": _figures(config, planned)}
    return Loggers(sinks, {**plain(config), "run": run, **figures}, say)


def _figures(config: Train, n_ranks: int) -> dict[str, Any]:
    """Those of `plan` on so many devices, whatever trainer.devices=auto has found."""
    here = dc.replace(config, trainer=dc.replace(config.trainer, devices=n_ranks, num_nodes=1))
    figures = plan(here).to_dict()
    return {name: figures[name] for name in _PLAN}


def _sink(config: Train, place: RunFolder, say: Say, name: str, node: dict[str, Any]) -> Sink:
    """A logger that writes into the run's folder, and appends there when the run is resumed."""
    if node["_target_"] in (WANDB, _LIGHTNING_WANDB):
        return _wandb(config, place, say, name, node)
    accepted = inspect.signature(class_of(f"logger.{name}", node["_target_"], config.imports)).parameters
    fitting: dict[str, Any] = {"save_dir": str(place.path), "name": name, "version": ""}
    if node["_target_"] == TENSORBOARD:
        x_axis = node.pop("x_axis", "step")
        done = place.first_step * (config.data.global_batch_size * config.seq_len if x_axis == "tokens" else 1)
        # Hides what an earlier start has there of the steps to come, also one without a checkpoint.
        (logger,) = _made(config, name, {**fitting, "purge_step": done + 1, **_given(node)})
        return TensorBoard(logger, x_axis)
    (logger,) = _made(config, name, {**{k: v for k, v in fitting.items() if k in accepted}, **node})
    return Sink(logger)


def _wandb(config: Train, place: RunFolder, say: Say, name: str, node: dict[str, Any]) -> Sink:
    from txtrain.monitor.loggers.wandb import WandB, kept_id

    x_axis, log_model, artifact = (
        node.pop("x_axis", "step"), node.get("log_model", False), node.pop("checkpoint_name", None)
    )
    run_id = kept_id(place, node.get("id"))
    fitting = {"save_dir": str(place.path), "name": f"{config.name}/{place.path.name}"}
    (logger,) = _made(config, name, {**fitting, **_given(node), "id": run_id, "_target_": WANDB})
    return WandB(logger, place.path, place.kept, say, x_axis, log_model, artifact)


def _given(node: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that are null."""
    return {key: value for key, value in node.items() if value is not None}


def _made(config: Train, name: str, node: Mapping[str, Any]) -> list[Any]:
    return instances({name: node}, "logger", config.imports)


# ----------------------------------------------------------------------------------------------- in the logger's thread


def _behind(logger: Any, line: Line) -> None:
    """Redirect the logger's methods to its thread. It stays an instance of its class, which callbacks look for."""
    for name in (*_CALLED, *_OURS):
        if hasattr(logger, name):
            setattr(logger, name, _Behind(line, getattr(logger, name), put=name in _CALLED))


class _Behind:
    """A method that runs in the logger's thread. Called from another thread it is queued, or ignored if not `put`."""

    def __init__(self, line: Line, method: Callable[..., object], put: bool) -> None:
        self._line, self._method, self._put = line, method, put

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self._line.is_here:
            self._method(*args, **kwargs)
        elif self._put:
            self._line.put(partial(self._method, *args, **kwargs))

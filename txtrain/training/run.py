"""A run, from its configuration to its folder. `train` is the whole of it; each line is a noun of the domain."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from txtrain import slurm
from txtrain.checkpoint import run_folder
from txtrain.checkpoint.run_folder import RunFolder
from txtrain.config.schema import Train
from txtrain.config.targets import instances
from txtrain.convert import plain
from txtrain.data.sources.source import settle
from txtrain.monitor import start_screen
from txtrain.monitor.console import Display
from txtrain.monitor.loggers.build import Loggers, make_loggers
from txtrain.monitor.metrics_csv import latest
from txtrain.monitor.profiler import Profiled
from txtrain.monitor.throughput import Machine
from txtrain.optim import state as optimizer_state
from txtrain.parallel.build import make_parallel
from txtrain.parallel.early_signals import PREEMPTED
from txtrain.parallel.one_process import OneProcess, precision_dtype
from txtrain.parallel.warnings import marked
from txtrain.parallel.world import World
from txtrain.slurm import Job
from txtrain.training import code_versions
from txtrain.training.callback import Recorder, check_data
from txtrain.training.data_module import DataModule
from txtrain.training.deadline import Deadline
from txtrain.training.lightning_trainer import make_trainer, quiet
from txtrain.training.limits import Limits
from txtrain.training.module import LitModule
from txtrain.training.signals import Cause, Preempted, Stop


@dc.dataclass(frozen=True)
class Result:
    """What `txtrain.train` returns.

    Attributes:
        run_dir: None with trainer.fast_dev_run, which writes nothing.
        metrics: of each column of metrics.csv, its last value.
        status: complete or preempted.
    """

    run_dir: Path | None
    metrics: dict[str, float]
    status: str = "complete"


@dc.dataclass(frozen=True)
class Origin:
    """How the configuration came about; recorded in run.json. folder: under runs/<name>/, where run_dir is null (the jobs of `-m`).
    start: when this process was started, by the system's clock. notes: sentences for the start screen."""

    grafts: Mapping[str, Any] = dc.field(default_factory=dict)
    given: Sequence[str] = ()
    folder: str | None = None
    start: float = dc.field(default_factory=time.time)
    notes: Sequence[str] = ()


def train(
    cfg: Train,
    model: nn.Module | None = None,
    data: DataModule | None = None,
    callbacks: Sequence[pl.Callback] = (),
    *,
    origin: Origin | None = None,
) -> Result:
    """Train a model, and leave a folder that `generate` and `resume` understand.

    Args:
        model: trained as it is; by default cfg.model's, freshly initialised.
        data: by default cfg.data's.
        callbacks: Lightning callbacks.

    Raises:
        ConfigError: what the configuration, the data or the checkpoint to continue from do not allow; nothing is written then.
    """
    origin, world = origin or Origin(), World.here()
    stop = Stop(first=world.rank == 0, several=world.size > 1, last_words=partial(_last_words, cfg, None))
    with stop, quiet(), (parallel := make_parallel(cfg)).started(), marked(world.rank, parallel.is_new) if world.size > 1 else contextlib.nullcontext():
        parallel.agree(_common(cfg))
        cfg, fallback = parallel.first(lambda: settle(short(cfg))) if data is None else (short(cfg), None)
        display = Display(silent=not parallel.is_first, verbosity=cfg.verbosity)
        place = None if cfg.trainer.fast_dev_run else parallel.first(lambda: run_folder.choose(cfg, origin.given, origin.folder))
        stop.last_words = partial(_last_words, cfg, place)
        for text in start_screen.restarted(place):
            display.tell(text)
        first, *loud = start_screen.opening(cfg, fallback)
        display.line(first)
        for text in (*loud, *origin.notes):
            display.tell(text)
        device = parallel.device()
        module = LitModule(cfg, initial_model(cfg, place) if model is None else model, parallel)
        optimizer_state.check(cfg.optimizer, module.parameter_groups())
        data = data or DataModule(cfg, fallback)
        parallel.in_turn(data.prepare)
        parallel.agree({"the fingerprint of the data": data.fingerprint})
        limits = Limits.of(cfg, data.n_train)
        module.plan(limits.steps)
        if place is not None and place.checkpoint is not None:
            if "data" not in cfg.resume_allow:
                check_data(place, data)
            if _nothing_left(place, limits):
                return _finished(place, display, parallel)
        machine = Machine.of(device, precision_dtype(cfg.trainer.precision))
        recorder = Recorder(cfg, data, place, limits, display, machine)
        called = [*callbacks, *instances(cfg.callbacks, "callbacks", cfg.imports), *([Profiled(cfg, place, display)] if cfg.profile else []), recorder]
        if place is not None:
            _create(place, parallel, cfg, _facts(cfg, module, data, machine, origin, fallback), origin.start)
        recorder.loggers = parallel.first_only(lambda: _loggers(cfg, place, display)) or recorder.loggers
        display.table(start_screen.table(cfg, data, limits.steps, machine, place, origin.grafts, parallel.title))
        trainer = make_trainer(cfg, parallel, limits, called, recorder.loggers.lightning, validate_first=recorder.open is not None)
        recorder.deadline = Deadline(parallel.first(_end_of_job))
        return _fit(trainer, module, data, recorder, stop)


def run_train(config: Train, origin: Origin | None = None) -> int:
    """`txtrain train`: the exit code. What goes wrong is raised: Python itself tells a failure by its traceback and exit code 1.

    Raises:
        ConfigError: as `train`, for the command line to print.
    """
    try:
        result = train(config, origin=origin)
    except KeyboardInterrupt:
        print("txtrain: stopped before the first step.", file=sys.stderr)
        return 1
    return PREEMPTED if result.status == "preempted" else 0


def initial_model(cfg: Train, place: RunFolder | None) -> nn.Module | None:
    """With init_from the model that the run starts from; a run that continues has its weights in its own checkpoint."""
    if cfg.init_from is None or (place is not None and place.source is not None):
        return None
    from txtrain.checkpoint.load import load
    from txtrain.model.build import build_model

    found = load(cfg.init_from, key="init_from").model
    with torch.device("meta"):
        model = build_model(cfg.model)  # of other dropouts, perhaps
    model.load_state_dict(found.state_dict(), assign=True)
    return model


def short(cfg: Train) -> Train:
    """With trainer.fast_dev_run=n: n steps, then n batches of validation."""
    n = int(cfg.trainer.fast_dev_run)
    if n == 0:
        return cfg
    limit = min(n, cfg.trainer.limit_val_batches)
    return dc.replace(cfg, trainer=dc.replace(cfg.trainer, max_steps=n, val_check_interval=n, limit_val_batches=limit, log_every_n_steps=1))


def _fit(trainer: pl.Trainer, module: LitModule, data: DataModule, recorder: Recorder, stop: Stop) -> Result:
    """Run Lightning's loop, and leave the folder with the status that the run has."""
    place, parallel, status = recorder.folder, module.parallel, "failed"
    try:
        stop.hold()
        recorder.stop = stop
        trainer.fit(module, datamodule=data)
        status = "complete"
    except Preempted:
        status = "preempted"
    finally:
        try:
            recorder.close()
            if place is not None and parallel.is_first:
                place.end(status, goodput=recorder.watch.goodput())
        finally:
            recorder.loggers.close(status)
    where = place.path if place is not None else None
    if status == "preempted":
        recorder.display.tell(f"stopped after step {module.step}" + (f"; to continue: txtrain resume={where}" if where else ""), style="bold")
        # The others wait for the first: some launchers end all at the first exit code that is not 0.
        stop.deaf = bool(parallel.first(lambda: _requeue(recorder.config, recorder.display.tell)))
        return Result(where, dict(recorder.metrics), status)
    recorder.display.table(recorder.watch.summary(module, recorder.metrics))
    if where is not None:
        recorder.display.tell(f"done: {where}", style="bold")
    return Result(where, dict(recorder.metrics), status)


def _end_of_job() -> float | None:
    job = Job.here()
    return None if job is None else job.end()


def _requeue(cfg: Train, say: Callable[[str], None]) -> bool:
    """Whether SLURM runs the job again at our word. SIGINT is no exception: in a job it comes from `--signal=INT@300`; who wants an end of it calls scancel."""
    job = Job.here()
    if job is None:
        return False
    if cfg.trainer.auto_requeue:
        say(job.requeue())
    else:
        say(f"Job {job.number} is not requeued: trainer.auto_requeue=false.")
    return slurm.has_requeued()


def _last_words(cfg: Train, place: RunFolder | None, cause: Cause) -> None:
    """Of the first process, where a run is stopped before its first step is done."""

    def say(text: str) -> None:
        os.write(2, f"txtrain: {text}\n".encode())

    say("stopped before the first step.")
    if place is not None:
        place.stopped()
    if cause != Cause.PERSON:
        _requeue(cfg, say)


def _loggers(cfg: Train, place: RunFolder | None, display: Display) -> Loggers:
    """They write into the run's folder, so it is there before one of them can fail: a wrong argument."""
    if place is None:
        return Loggers()
    with contextlib.ExitStack() as undo:
        undo.callback(place.discard)
        made = make_loggers(cfg, place, lambda text: display.tell(text, style="bold"))
        undo.pop_all()
        return made


def _create(place: RunFolder, parallel: OneProcess, cfg: Train, facts: Mapping[str, Any], start: float) -> None:
    """The first process makes the folder; where it is then, all know."""

    def create() -> Path:
        place.create(cfg, facts, start)
        return place.path

    place.path = parallel.first(create)


def _common(cfg: Train) -> dict[str, str]:
    """What the processes of one run must have alike: the configuration value by value, so that the one that differs is named, and the code."""
    return {**{key: str(value) for key, value in run_folder.flat(plain(cfg)).items()}, **code_versions.versions(cfg.imports)}


def _nothing_left(place: RunFolder, limits: Limits) -> bool:
    state = place.state
    return state["open_row"] is None and limits.reached(state["step"], state["seconds"])


def _finished(place: RunFolder, display: Display, parallel: OneProcess) -> Result:
    """The run had reached its end; it may have been killed before it could say so."""
    display.tell(f"{place.path} has all of its {place.state['step']} steps: nothing left to do.")
    if parallel.is_first:
        place.end("complete")
    return Result(place.path, latest(place.path / "metrics.csv"))


def _facts(cfg: Train, module: LitModule, data: DataModule, machine: Machine, origin: Origin, fallback: str | None) -> dict[str, Any]:
    """What run.json says."""
    return {
        "name": cfg.name,
        **code_versions.environment(machine.name, module.parallel.world.size),
        "slurm": None if (job := Job.here()) is None else {"job": job.number, "restarts": job.restarts},
        "parameters": sum(p.numel() for p in module.model.parameters()),
        "data": {"source": data.source, "fingerprint": data.fingerprint},
        "data_order_hash": None,
        "fallback": fallback,
        "given": list(origin.given),
        "grafts": dict(origin.grafts),
        "step": 0,
    }

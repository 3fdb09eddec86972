"""`train`: a run, from its configuration to its folder."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint import restore, run_folder
from txtrain.checkpoint.run_folder import RunFolder
from txtrain.config.schema import Train
from txtrain.config.targets import instances
from txtrain.data.sources.source import settle
from txtrain.errors import ConfigError
from txtrain.ground.convert import checked, flat, plain
from txtrain.ground.slurm import Job
from txtrain.model.transformer import Transformer
from txtrain.monitor import start_screen
from txtrain.monitor.console import Display
from txtrain.monitor.loggers.build import Loggers, make_loggers
from txtrain.monitor.loggers.records import failures_said_once
from txtrain.monitor.metrics_csv import check_rows, latest
from txtrain.monitor.profiler import Profiled
from txtrain.monitor.throughput import Machine
from txtrain.objectives.base import Objective, build_objective
from txtrain.optim import state as optimizer_state
from txtrain.parallel.build import make_parallel
from txtrain.parallel.early_signals import PREEMPTED
from txtrain.parallel.one_process import OneProcess, precision_dtype
from txtrain.parallel.warnings import marked
from txtrain.parallel.world import World
from txtrain.training import code_versions
from txtrain.training.callback import RunCallback
from txtrain.training.columns import check_metrics, columns_of
from txtrain.training.data_module import DataModule
from txtrain.training.deadline import Deadline
from txtrain.training.ending import LastWords, Result, end_of_job, fit
from txtrain.training.initial_weights import (
    InitialWeights,
    banned_tokens,
    base_of,
    began_with,
    generation_file,
    initial_weights,
)
from txtrain.training.lightning_trainer import make_trainer, quiet
from txtrain.training.limits import Limits
from txtrain.training.models_read import check_tokenizers, models_read
from txtrain.training.module import LitModule, check_model, starting_weights
from txtrain.training.signals import Stop
from txtrain.training.tasks import prepare_tasks


@dc.dataclass(frozen=True)
class Origin:
    """How the configuration came about; recorded in run.json.

    Attributes:
        folder: name of the folder under runs/<name>/ where run_dir is null (the jobs of `-m`).
        start: when this process was started, in seconds since 1970.
        notes: sentences for the start screen.
    """

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
        ConfigError: the configuration, the data or the checkpoint does not allow the run; nothing is written then.
        RunError: an error that only training can find, such as a bad row of the data; the run's folder says `failed`.
    """
    checked(cfg, Train, "cfg")
    check_model(model, cfg)
    _check_given(cfg, model, data, callbacks)
    origin, world = origin or Origin(), World.here()
    last_words = LastWords(cfg, first=world.rank == 0)
    with _surroundings(cfg, world, last_words) as (stop, parallel), contextlib.ExitStack() as starting:
        if world.size > 1:
            parallel.agree(_common(cfg))  # reads all of the package's files
        cfg, fallback = parallel.first(lambda: settle(short(cfg))) if data is None else (short(cfg), None)
        place = (
            None if cfg.trainer.fast_dev_run
            else parallel.first(lambda: run_folder.choose(cfg, origin.given, origin.folder))
        )
        last_words.know(place)
        display = _opening(cfg, fallback, place, origin, parallel)
        device = parallel.device()
        objective = build_objective(cfg)
        module, weights = _module(cfg, model, place, parallel, objective)
        source = None if place is None else place.source
        data = data or DataModule(cfg, fallback or "", objective)
        parallel.in_turn(data.prepare)
        parallel.together(lambda: check_tokenizers(cfg, data.tokenizer))
        parallel.agree({"the fingerprint of the data": data.fingerprint})
        limits = Limits.of(cfg, data.n_train)
        module.plan(limits.steps)
        if place is not None and place.checkpoint is not None:
            _check_data(cfg, place, data)
            if _nothing_left(place, limits, cfg):
                return _finished(place, display, parallel)
        if source is not None:
            _check_continues(cfg, source)
        tasks = prepare_tasks(cfg, data, parallel)
        check_metrics(cfg, columns_of(cfg, objective.columns, data, tasks))
        machine = Machine.of(device, precision_dtype(cfg.trainer.precision))
        called = [*callbacks, *instances(cfg.callbacks, "callbacks", cfg.imports)]
        called += [Profiled(cfg, place, display)] if cfg.profile else []
        read_from = weights.record(module.fit) if weights is not None and module.fit is not None else None
        if place is not None:
            facts = _facts(cfg, module, data, machine, origin, fallback) | {"init_from": read_from}
            starting.push(place.cannot_start)
            _create(place, parallel, cfg, data, facts, origin.start)
        planned = world.size if model is None else None
        loggers = parallel.first_only(lambda: _loggers(cfg, place, display, planned)) or Loggers()
        display.table(start_screen.table(
            cfg, data, limits.steps, machine, place, origin.grafts, parallel.title,
            (module.n_trained, module.n_params),
            () if read_from is None else start_screen.weights(read_from),
        ))
        ours = RunCallback(
            cfg, data, place, limits, display, machine, loggers, stop, Deadline(parallel.first(end_of_job)),
            objective.columns, generation_file(model, None if weights is None else weights.source, source), tasks,
        )
        trainer = make_trainer(
            cfg, parallel, limits, [*called, ours], loggers.lightning, validate_first=ours.open is not None
        )
        starting.pop_all()  # `fit` records how it ends
        return fit(trainer, module, data, ours)


def _opening(
    cfg: Train, fallback: str | None, place: RunFolder | None, origin: Origin, parallel: OneProcess
) -> Display:
    """The screen, with its first lines."""
    display = Display(silent=not parallel.is_first, verbosity=cfg.verbosity)
    first, *loud = start_screen.opening(cfg, fallback)
    display.tell(*start_screen.restarted(place), *parallel.first(lambda: _gone(place)))
    display.line(first)
    display.tell(*loud, *origin.notes)
    return display


def _module(
    cfg: Train, model: nn.Module | None, place: RunFolder | None, parallel: OneProcess, objective: Objective
) -> tuple[LitModule, InitialWeights | None]:
    """The module that is trained, checked against the checkpoint that it continues from, and its initial weights."""
    base = parallel.first(lambda: base_of(cfg, place))
    weights = initial_weights(cfg, place, parallel, base) if model is None else None
    read = models_read(cfg, parallel)
    source, start = None if place is None else place.source, None if weights is None else weights.source
    module = LitModule(cfg, model, parallel, objective, start, read, source is not None, began_with(place))
    module.base = base
    if isinstance(module.model, Transformer):
        module.model.banned_tokens = banned_tokens(model, start, source, cfg)
    optimizer_state.check(cfg.optimizer, module.parameter_groups())
    if source is not None:
        parallel.first(lambda: restore.check_weights(source, module.model))
    return module, weights


@contextlib.contextmanager
def _surroundings(cfg: Train, world: World, last_words: LastWords) -> Iterator[tuple[Stop, OneProcess]]:
    """Handle signals, silence Lightning, connect the ranks, and label warnings with their rank."""
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop(first=world.rank == 0, several=world.size > 1, last_words=last_words))
        stack.enter_context(quiet())
        stack.enter_context(failures_said_once())
        parallel = make_parallel(cfg)
        stack.enter_context(parallel.started())
        if world.size > 1:
            stack.enter_context(marked(world.rank, parallel.is_new))
        yield stop, parallel


def _check_given(cfg: Train, model: object, data: object, callbacks: object) -> None:
    """Refuse what does not fit the configuration, which is what the run's folder records."""
    if model is not None and cfg.adapter.alone:
        why = "its checkpoints hold the adapter alone, and name the base by its place on the disk"
        raise ConfigError(f"`model` must be None with adapter={cfg.adapter.type}: {why}, init_from.")
    if data is not None:
        if not isinstance(data, DataModule):
            raise ConfigError(f"`data` must be a txtrain.DataModule, but is {type(data).__name__} instead.")
        ours, theirs = _shape_of_batches(cfg), _shape_of_batches(data.given)
        for key, value in ours.items():
            if theirs[key] != value:
                what = f"{key} {value}, as cfg has it, but is made for {theirs[key]} instead"
                raise ConfigError(f"`data` must be made for {what}: txtrain.DataModule(cfg).")
    if not isinstance(callbacks, Sequence) or not all(isinstance(c, pl.Callback) for c in callbacks):
        raise ConfigError(f"`callbacks` must be a list of lightning Callbacks, but is {callbacks!r} instead.")


def _shape_of_batches(cfg: Train) -> dict[str, Any]:
    """What decides the batches of a training step."""
    return {
        "model.topology": cfg.model.topology,
        "objective": cfg.objective,
        "data.kind": cfg.data.sample_kind,
        "data.global_batch_size": cfg.data.global_batch_size,
        "data.seq_len": cfg.seq_len,
    }


def run_train(config: Train, origin: Origin | None = None) -> int:
    """`txtrain train`: returns the exit code. Other failures are raised: Python prints the traceback and exits with 1.

    Raises:
        ConfigError: as `train`, for the command line to print.
    """
    try:
        result = train(config, origin=origin)
    except KeyboardInterrupt:
        print("txtrain: stopped before the first step.", file=sys.stderr)
        return 1
    return PREEMPTED if result.status == "preempted" else 0


def short(cfg: Train) -> Train:
    """With trainer.fast_dev_run=n: n steps, then n batches of validation."""
    n = int(cfg.trainer.fast_dev_run)
    if n == 0:
        return cfg
    limit = min(n, cfg.trainer.limit_val_batches)
    return dc.replace(
        cfg,
        trainer=dc.replace(
            cfg.trainer, max_steps=n, val_check_interval=n, limit_val_batches=limit, log_every_n_steps=1
        ),
    )


def _loggers(cfg: Train, place: RunFolder | None, display: Display, planned: int | None) -> Loggers:
    """The run's loggers. They write into its folder, which exists by now."""
    if place is None:
        return Loggers()
    return make_loggers(cfg, place, lambda text: display.tell(text, style="bold"), planned)


def _create(
    place: RunFolder, parallel: OneProcess, cfg: Train, data: DataModule, facts: Mapping[str, Any], start: float
) -> None:
    """The first rank makes the folder and tells the others its path."""

    def create() -> Path:
        place.create(cfg, facts, start)
        data.write_skipped(place.path)
        return place.path

    place.path = parallel.first(create)


def _common(cfg: Train) -> dict[str, str]:
    """What must be equal on all ranks: each value of the configuration, so that an error names its key; the code."""
    return {key: str(value) for key, value in flat(plain(cfg)).items()} | code_versions.versions(cfg.imports)


def _check_data(cfg: Train, folder: RunFolder, data: Any) -> None:
    """Refuse to continue a run on other data, unless `resume_allow` names it.

    Raises:
        ConfigError: text, tokenizer or packing are not those of the checkpoint.
    """
    state = folder.state
    if "data" in cfg.resume_allow:
        return
    if data.fingerprint != state.data_fingerprint or data.order_hash(state.step) != state.data_order_hash:
        raise ConfigError(
            f"`data` must be what {folder.path} was trained on (fingerprint {state.data_fingerprint}), "
            f"but is {data.fingerprint} instead: "
            "the files have changed. Restore them, or train anew in another run_dir."
        )


def _nothing_left(place: RunFolder, limits: Limits, cfg: Train) -> bool:
    state, patience = place.state, cfg.trainer.stop_after.patience
    stopped = patience is not None and state.stopping is not None and state.stopping[1] >= patience
    return state.open_row is None and (stopped or limits.reached(state.step, state.seconds))


def _check_continues(cfg: Train, source: Path) -> None:
    """Refuse a checkpoint that a run with save.weights_only_last=true left at its end."""
    if checkpoint.read_state(source).weights_only:
        raise ConfigError(
            f"`{'resume' if cfg.fork is None else 'fork'}`: {source} holds weights alone "
            "(save.weights_only_last=true), from which no run continues. "
            f"A new run from its weights: init_from={source}."
        )


def _finished(place: RunFolder, display: Display, parallel: OneProcess) -> Result:
    """The run had made its last step; it may have been killed before it could record that."""
    display.tell(f"{place.path} has all of its {place.state.step} steps: nothing left to do.")
    # A complete run keeps its end: the time since then is no loss of goodput.
    if parallel.is_first and place.facts.get("status") != "complete":
        place.end("complete")
    return Result(place.path, latest(place.path / "metrics.csv"))


def _gone(place: RunFolder | None) -> list[str]:
    """Warnings about files that a resumed run lacks and can do without; ConfigError if metrics.csv has lost rows."""
    if place is None or place.checkpoint is None:
        return []
    facts = None if place.facts else f"{place.path / 'run.json'} is gone: starts and times are counted from now on."
    return [text for text in (facts, check_rows(place)) if text]


def _facts(
    cfg: Train, module: LitModule, data: DataModule, machine: Machine, origin: Origin, fallback: str | None
) -> dict[str, Any]:
    """The contents of run.json."""
    return {
        "name": cfg.name,
        **code_versions.environment(machine.name, module.parallel.world.size),
        "slurm": None if (job := Job.here()) is None else job.record,
        "parameters": module.n_params,
        "trained_parameters": module.n_trained,
        "base": None if module.base is None else dc.asdict(module.base),
        "data": data.facts,
        "data_order_hash": None,
        **({} if (start := starting_weights(module)) is None else {"starting_weights": start}),
        "fallback": fallback,
        "given": list(origin.given),
        "grafts": dict(origin.grafts),
        "step": 0,
    }

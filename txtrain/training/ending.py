"""The end of a run: Lightning's loop, what its folder records of how it ended, and who asks SLURM for another start."""

from __future__ import annotations

import contextlib
import dataclasses as dc
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning.pytorch as pl

from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint.run_folder import RunFolder
from txtrain.config.schema import Train
from txtrain.errors import ConfigError, RunError, denied
from txtrain.ground import files, slurm
from txtrain.ground.slurm import Job
from txtrain.parallel.early_signals import PREEMPTED, say
from txtrain.training.callback import RunCallback
from txtrain.training.data_module import DataModule
from txtrain.training.module import LitModule
from txtrain.training.signals import Cause, Preempted


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


@contextlib.contextmanager
def _begun() -> Iterator[None]:
    """Once the run's folder exists, what may not be read is a RunError, and so is a ConfigError, except one about the
    checkpoint to start from.

    An error from a worker of the loader arrives as text, behind torch's copy of the worker's traceback.
    """
    try:
        yield
    except checkpoint.LoadError:
        raise
    except ConfigError as e:
        said = str(e).rpartition(f"{ConfigError.__name__}: ")[2].strip()
        raise RunError(*said.splitlines()) from e
    except PermissionError as e:
        raise RunError(denied(e)) from e


@_begun()
def fit(trainer: pl.Trainer, module: LitModule, data: DataModule, run: RunCallback) -> Result:
    """Run Lightning's loop, and record how the run ended in its folder."""
    place, parallel, status = run.folder, module.parallel, "failed"

    def end() -> None:
        if place is not None and parallel.is_first:
            place.end(status, goodput=run.watch.goodput())

    # Each callback runs even if one before it fails: a full disk is full for all of them.
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as last:
        if place is not None:
            last.enter_context(files.writing(place.path, "run_dir"))
        last.callback(lambda: run.loggers.close(status))
        last.callback(end)
        last.callback(run.close)
        try:
            run.stop.hold()
            trainer.fit(module, datamodule=data)
            status = "complete"
        except Preempted:
            status = "preempted"
        except checkpoint.LoadError:
            if place is not None and parallel.is_first:
                undo.callback(place.discard)
            raise
    where = place.path if place is not None else None
    if status == "preempted":
        run.display.tell(
            f"stopped after step {module.step}" + (f"; to continue: txtrain resume={where}" if where else ""),
            style="bold",
        )
        # The other ranks wait for the first: some launchers end all ranks at the first exit code that is not 0.
        run.stop.deaf = parallel.first(lambda: _requeue(run.config, run.display.tell))
        parallel.first(lambda: _check_progress(run.config))
        return Result(where, dict(run.metrics), status)
    run.display.table(run.watch.summary(module, run.metrics))
    if where is not None:
        run.display.tell(f"done: {where}", style="bold")
    return Result(where, dict(run.metrics), status)


def end_of_job() -> float | None:
    job = Job.here()
    return None if job is None else job.end()


def _requeue(cfg: Train, say: Callable[[str], None]) -> bool:
    """Whether SLURM runs the job again because we asked.

    SIGINT is no exception: in a job it comes from `--signal=INT@300`; a user who wants to end the job calls scancel.
    """
    job = Job.here()
    if job is None:
        return False
    if cfg.trainer.auto_requeue:
        say(job.requeue(_gives_up(cfg)))
    else:
        say(f"Job {job.number} is not requeued: trainer.auto_requeue=false.")
    return slurm.has_requeued()


def _gives_up(cfg: Train) -> bool:
    """Whether the SLURM job was started too often in a row without a saved step; exit code 1 then stops scripts too."""
    job = Job.here()
    return job is not None and job.gives_up(cfg.trainer.max_requeues, cfg.run_dir, cfg.resume, name=cfg.name)


def _check_progress(cfg: Train) -> None:
    """Raise RunError if the run has stopped without a new checkpoint too often in a row."""
    if _gives_up(cfg):
        raise RunError(
            "The run has saved no step and must not be started again: "
            f"trainer.max_requeues={cfg.trainer.max_requeues}."
        )


class LastWords:
    """What the first rank says and does when a run is stopped before its first step is done. Gives the exit code."""

    def __init__(self, cfg: Train, first: bool) -> None:
        self._cfg, self._first = cfg, first
        self._folders: list[RunFolder] = []

    def know(self, place: RunFolder | None) -> None:
        """The run's folder has been chosen."""
        self._folders += [] if place is None else [place]

    def __call__(self, cause: Cause) -> int:
        if self._first:
            say("stopped before the first step.")
            for place in self._folders:
                place.stopped()
            if cause != Cause.PERSON:
                _requeue(self._cfg, say)
        return 1 if _gives_up(self._cfg) else PREEMPTED

"""-m: every job is validated before the first starts, and one that fails does not stop the others.

Each job has its own process: with Hydra's basic launcher seeds, process groups and device memory reach the next job.
`hydra/launcher=slurm` submits SLURM jobs (slurm_sweep.py); other launchers are called by Hydra's plugin interface.
"""

from __future__ import annotations

import dataclasses as dc
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from txtrain.cli.verbs import root_of, work_of
from txtrain.config import slurm_launcher
from txtrain.config.compose import typed
from txtrain.config.composed import Composed, to_file
from txtrain.config.loader import Loader
from txtrain.ground import files
from txtrain.ground.slurm import Job
from txtrain.parallel.early_signals import PREEMPTED
from txtrain.parallel.launch import Group, python
from txtrain.run_config import RunConfig


def sweep(verb: str, loader: Loader, jobs: Sequence[tuple[Composed, list[Override]]]) -> int:
    """Run all jobs. Exit code: 1 if one failed, else 75 if one was preempted, else 0."""
    # named by the SLURM job, so that a requeued one finds its members
    stamp = f"slurm-{job.number}" if (job := Job.here()) else time.strftime("%Y-%m-%d_%H-%M-%S")
    chosen, hydra = slurm_launcher.named(jobs[0][1]), [o for o in jobs[0][1] if o.is_hydra_override()]
    lines = [[str(o.input_line) for o in overrides if not o.is_hydra_override()] for _, overrides in jobs]
    if chosen == "slurm":
        from txtrain.cli.slurm_sweep import identity, submit

        stamp, how = identity(verb, lines), slurm_launcher.slurm(verb, hydra, loader)
        return submit(verb, [in_folder(job, stamp, n) for n, (job, _) in enumerate(jobs)], varied(lines), how, stamp)
    if chosen is not None:
        codes = _through_launcher(verb, loader, [str(o.input_line) for o in hydra], lines, stamp)
    else:
        codes = _in_subprocesses(verb, [in_folder(job, stamp, n) for n, (job, _) in enumerate(jobs)], varied(lines))
    for number, code in enumerate(codes):
        if code:
            print(
                f"txtrain: job {number} {'was preempted' if code == PREEMPTED else f'failed (exit code {code})'}",
                file=sys.stderr
            )
    if len(codes) < len(jobs):
        print(f"txtrain: interrupted; {len(jobs) - len(codes)} of {len(jobs)} jobs were not started", file=sys.stderr)
    return 1 if set(codes) - {0, PREEMPTED} else PREEMPTED if PREEMPTED in codes or len(codes) < len(jobs) else 0


def in_folder(job: Composed, stamp: str, number: int) -> Composed:
    """The job with a run folder of its own; verbs without run folders stay as they are."""
    config = job.config
    if not isinstance(config, RunConfig):
        return job
    if config.run_dir is None:
        return dc.replace(job, folder=f"{stamp}-{number}")
    return dc.replace(job, config=dc.replace(config, run_dir=f"{config.run_dir}/{number}"))


def varied(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Each job's overrides that not all jobs share: `model.norm_position=post`."""
    return [" ".join(line.lstrip("+") for line in lines if not all(line in other for other in jobs)) for lines in jobs]


# ----------------------------------------------------------------------------------------------------------- one by one


def _in_subprocesses(verb: str, jobs: Sequence[Composed], labels: Sequence[str]) -> list[int]:
    """Exit codes of the jobs that were started. A signal goes to the running job; no further one is started."""
    codes: list[int] = []
    with files.scratch() as folder, Group() as group:
        for number, job in enumerate(jobs):
            if group.received:
                break
            file = folder / f"{number}.yaml"
            to_file(job, file)
            print(f"txtrain: job {number} (of 0 to {len(jobs) - 1}): {labels[number]}", file=sys.stderr)
            _start(group, verb, file)
            codes.append(group.wait())
    return codes


def _start(group: Group, verb: str, file: Path) -> None:
    """If the sweep itself is killed, the job saves and ends: it would go on unseen."""
    group.start(
        [*python(), "-m", "txtrain", verb], [os.environ | {"TXTRAIN_CONFIG": str(file)}], orphaned=signal.SIGTERM
    )


# ---------------------------------------------------------------------------------------------------- Hydra's launchers


def task(cfg: DictConfig) -> int:
    """One job, perhaps in a process on another machine. Returns its exit code, never raises: Hydra would at the end."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    verb, stamp, number = str(hydra.job.config_name), str(hydra.job.name), int(hydra.job.num)
    holder = HydraConfig.instance()
    saved, holder.cfg = holder.cfg, None  # else Lightning starts ranks by Hydra's command line: the whole sweep
    try:
        job = typed(cfg, root_of(verb))
        return work_of(verb, in_folder(job, stamp, number), time.time())()
    except Exception:  # an exception would end the other jobs of Hydra's launcher
        traceback.print_exc()
        return 1
    finally:
        holder.cfg = saved


def _through_launcher(verb: str, loader: Loader, hydra: list[str], jobs: list[list[str]], stamp: str) -> list[int]:
    from hydra._internal.callbacks import Callbacks
    from hydra._internal.hydra import Hydra
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    master = Hydra("txtrain", loader).compose_config(
        verb, [*hydra, f"hydra.job.name={stamp}"], run_mode=RunMode.MULTIRUN
    )
    context = HydraContext(config_loader=loader, callbacks=Callbacks(master))
    plugin = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=master)
    results = plugin.launch(jobs, initial_job_idx=0)
    return [int(result.return_value) for result in results]

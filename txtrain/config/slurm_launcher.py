"""The launcher of a sweep (`hydra/launcher=`), and the keys of the SLURM launcher. No torch."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from txtrain.config.loader import Loader, load
from txtrain.config.overrides import LAUNCHER, hydra_errors
from txtrain.config.units import bytes_of
from txtrain.errors import ConfigError
from txtrain.ground.convert import part
from txtrain.registry import config, knob


@config
class SlurmConfig:
    """`hydra/launcher=slurm`: a job array by submitit, one job per member. Keys as in hydra-submitit-launcher."""

    type: Literal["slurm"] = "slurm"
    name: str = "txtrain"  # name of the job
    # folder for scripts, logs and the members' states; null: runs/sweeps/<digest of the members>
    submitit_folder: str | None = None
    timeout_min: int = knob(60, at_least=1)  # time limit of a job; a run that needs longer is requeued and continues
    signal_delay_s: int = knob(120, above=0)  # seconds before the time limit at which the run saves
    nodes: int | None = knob(None, at_least=1)  # nodes of each member; null: trainer.num_nodes
    # ranks on each node; null: trainer.devices; if that is auto, gpus_per_node, or 1
    tasks_per_node: int | None = knob(None, at_least=1)
    cpus_per_task: int | None = knob(None, at_least=1)
    gpus_per_node: int | None = knob(None, at_least=0)
    mem_gb: float | None = knob(None, above=0)  # memory of each node
    array_parallelism: int = knob(256, at_least=1)  # maximum number of members that run at once
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gres: str | None = None
    comment: str | None = None
    cpus_per_gpu: int | None = knob(None, at_least=1)
    gpus_per_task: int | None = knob(None, at_least=1)
    mem_per_gpu: str | None = None
    mem_per_cpu: str | None = None
    # further options of sbatch, without dashes
    additional_parameters: dict[str, Any] = dc.field(default_factory=dict)
    setup: tuple[str, ...] = ()  # shell lines that run in the job before the run
    # command for Python in the job, such as "apptainer exec --nv image.sif python"; null: the submitting one
    python: str | None = None
    stderr_to_stdout: bool = False  # one log for both
    # memory of one device, such as 80GB; a member that does not fit, by `txtrain plan`, is refused
    gpu_memory: str | None = knob(None, unit=True)
    wait: bool = True  # wait until all members have ended; false: return after submitting

    def check(self) -> Iterator[str]:
        limit, delay = 60 * self.timeout_min, self.signal_delay_s
        if delay >= limit:
            allowed = f"above 0 and below timeout_min ({limit} s)"
            yield f"`hydra.launcher.signal_delay_s` must be {allowed}, but is {delay} instead."
        if self.gpu_memory is not None and not bytes_of(self.gpu_memory):
            yield f"`hydra.launcher.gpu_memory` must be a size such as 80GB, but is {self.gpu_memory!r} instead."


def named(overrides: Sequence[Override]) -> str | None:
    """The launcher that a job's overrides choose, or None."""
    chosen = [str(o.value()) for o in overrides if o.key_or_group == LAUNCHER and not o.is_delete()]
    return chosen[-1] if chosen else None


def unread(overrides: Sequence[Override], multirun: bool) -> Iterator[str]:
    """Problems: overrides of a launcher that nothing would read."""
    for o in overrides:
        if not multirun and (o.key_or_group == LAUNCHER or o.key_or_group.startswith("hydra.launcher.")):
            yield f"`{o.input_line}` needs -m: launchers run sweeps (a sweep may have one member)."
        elif o.key_or_group.startswith("hydra.launcher.") and named(overrides) in (None, "basic"):
            yield f"`{o.key_or_group}` is for {LAUNCHER}=slurm, which is not asked for."


def slurm(verb: str, overrides: Sequence[Override], loader: Loader) -> SlurmConfig:
    """The keys of `hydra/launcher=slurm`, with a job's overrides.

    Raises:
        ConfigError: no such key, or a wrong value.
    """
    with hydra_errors():
        cfg = load(verb, overrides, loader)
        raw: Any = OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    made, problems = part(SlurmConfig, raw, "hydra.launcher")
    if made is None or (problems := list(made.check())):
        raise ConfigError(*problems)
    return made

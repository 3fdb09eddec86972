"""Who runs the members of a sweep (`hydra/launcher=`), and the keys of those that txtrain knows. No torch."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import OmegaConf

from txtrain.config.units import bytes_of
from txtrain.convert import build
from txtrain.errors import hint

if TYPE_CHECKING:
    from txtrain.config.compose import Loader

GROUP = "hydra/launcher"


@dc.dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """`hydra/launcher=slurm`: members as one array of jobs, submitted by submitit. The words are those of hydra-submitit-launcher."""

    type: Literal["slurm"] = "slurm"
    name: str = "txtrain"  # of the job
    submitit_folder: str | None = None  # scripts, logs and what is known of the members; null: runs/sweeps/<digest of the members>
    timeout_min: int = 60  # of one job; a run that needs longer is requeued, and goes on
    signal_delay_s: int = 120  # before that the run is told to save
    nodes: int | None = None  # of each member; null: trainer.num_nodes
    tasks_per_node: int | None = None  # null: trainer.devices, and where that is auto gpus_per_node, or one
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    mem_gb: float | None = None  # of each node
    array_parallelism: int = 256  # members that run at once, at most
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gres: str | None = None
    comment: str | None = None
    cpus_per_gpu: int | None = None
    gpus_per_task: int | None = None
    mem_per_gpu: str | None = None
    mem_per_cpu: str | None = None
    additional_parameters: dict[str, Any] = dc.field(default_factory=dict)  # further options of sbatch, without their dashes
    setup: tuple[str, ...] = ()  # shell lines before the run, in its job
    python: str | None = None  # how Python is started there, such as "apptainer exec --nv image.sif python"; null: the one that submits
    stderr_to_stdout: bool = False  # one log for both
    gpu_memory: str | None = None  # of one device, such as 80GB: a member that `txtrain plan` finds too large is not submitted
    wait: bool = True  # until all members have ended; false: return once they are submitted

    def check(self) -> Iterator[str]:
        for name in ("timeout_min", "nodes", "tasks_per_node", "cpus_per_task", "array_parallelism", "cpus_per_gpu", "gpus_per_task"):
            if (value := getattr(self, name)) is not None and value < 1:
                yield f"`hydra.launcher.{name}` must be at least 1, but is {value} instead."
        if self.gpus_per_node is not None and self.gpus_per_node < 0:
            yield f"`hydra.launcher.gpus_per_node` must be at least 0 or null, but is {self.gpus_per_node} instead."
        if not 0 < self.signal_delay_s < 60 * max(1, self.timeout_min):
            yield f"`hydra.launcher.signal_delay_s` must be above 0 and below timeout_min ({60 * self.timeout_min} s), but is {self.signal_delay_s} instead."
        if self.mem_gb is not None and not self.mem_gb > 0:
            yield f"`hydra.launcher.mem_gb` must be above 0 or null, but is {self.mem_gb} instead."
        if self.gpu_memory is not None and not bytes_of(self.gpu_memory):
            yield f"`hydra.launcher.gpu_memory` must be a size such as 80GB or 79.6GiB, but is {self.gpu_memory!r} instead."


@dc.dataclass(frozen=True, kw_only=True)
class _Hydra:
    launcher: SlurmConfig

    def check(self) -> Iterator[str]:
        yield from self.launcher.check()


@dc.dataclass(frozen=True, kw_only=True)
class _Root:
    """So that a key is called as it is typed: hydra.launcher.partition."""

    hydra: _Hydra

    def check(self) -> Iterator[str]:
        yield from self.hydra.check()


def named(lines: Sequence[str]) -> str | None:
    """The launcher that a job's overrides choose; None: they do not say."""
    return next((line.partition("=")[2] for line in reversed(lines) if line.lstrip("+").startswith(f"{GROUP}=")), None)


def unread(lines: Sequence[str]) -> Iterator[str]:
    """Of a job's overrides the keys of a launcher that has none."""
    if named(lines) in (None, "basic"):
        for line in lines:
            if line.lstrip("+").startswith("hydra.launcher."):
                yield f"`{line.lstrip('+').partition('=')[0]}` is for {GROUP}=slurm, which is not asked for."


def check_name(name: str, loader: Loader) -> Iterator[str]:
    """Whether there is such a launcher."""
    options = loader.get_group_options(GROUP)
    if name not in options:
        yield f"`{GROUP}={name}` must be one of {', '.join(options)}.{hint(name, options, GROUP + '={}')}"


def slurm(verb: str, lines: Sequence[str], loader: Loader) -> SlurmConfig:
    """The keys of `hydra/launcher=slurm`, as a job's overrides set them.

    Raises:
        ConfigError: a key that does not exist, or a value that is none of it.
    """
    from txtrain.config.compose import load
    from txtrain.config.overrides import hydra_errors

    with hydra_errors():
        cfg = load(verb, list(lines), loader)
        raw: Any = OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    return build(_Root, {"hydra": {"launcher": raw}}).hydra.launcher

"""The typed configuration of plan. No torch."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import Literal

from txtrain.config import hardware
from txtrain.config.schema import Train
from txtrain.config.units import bytes_of
from txtrain.errors import hint
from txtrain.parallel import config as parallel
from txtrain.registry import config, knob


@dc.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Hardware that `plan` estimates for, and how."""

    device: str = "H100"  # accelerator, in any spelling (h100, a100-80gb); its published peak: docs/plan.md
    # number of devices; null: trainer.devices * trainer.num_nodes, or 1 if that is auto
    n_devices: int | None = knob(None, at_least=1)
    # memory of one device, such as 80GB or 79.6GiB; a run that does not fit is refused
    memory: str | None = knob(None, unit=True)
    # also run a step of the real, wrapped model without storage, with the CPU's kernels; takes torch and seconds
    simulate: bool = False
    # FLOP/s of one device; null: the published peak of plan.device at trainer.precision
    peak_flops: float | None = knob(None, above=0)
    mfu: float = knob(0.4, above=0, at_most=1)  # fraction of the peak that the run reaches
    bandwidth: float | None = knob(None, above=0)  # bytes a second of one device's memory; null: the published ones
    cache_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # dtype of the key-value cache
    format: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", hardware.key_of(self.device) or self.device)

    def check(self) -> Iterator[str]:
        if self.device not in hardware.PUBLISHED:
            yield (
                f"`plan.device` must be one of {', '.join(hardware.PUBLISHED)}, but is {self.device} instead: "
                f"for another give plan.peak_flops.{hint(self.device, hardware.PUBLISHED)}"
            )
        if self.memory is not None and not bytes_of(self.memory):
            yield f"`plan.memory` must be a size such as 80GB or 79.6GiB, but is {self.memory!r} instead."


@config
class Plan(Train):
    """The run of `train`, and what to estimate it for."""

    plan: PlanConfig = dc.field(default_factory=PlanConfig)

    def _check_between(self) -> Iterator[str]:
        yield from Train._check_between(self)
        if not (self.data.global_batch_size % self.micro_batch_size) and parallel.processes(self) is None:
            yield from self._check_processes(self.plan.n_devices or 1)
        started, asked = parallel.processes(self), self.plan.n_devices
        if started is not None and asked not in (None, started):
            yield (
                f"`plan.n_devices` must be null or {started}, as trainer.devices={self.trainer.devices} on "
                f"trainer.num_nodes={self.trainer.num_nodes} says, but is {asked} instead. Nearest: null."
            )
        if self.plan.simulate and (self.objective.same_tokenizer or self.objective.reads_start):
            yield (
                f"`plan.simulate` must be false with objective={self.objective.type}, which reads a second model, but "
                "is true instead. The plan without it counts that model's weights."
            )
        accelerator, precision = hardware.PUBLISHED[self.plan.device], self.trainer.precision
        if self.plan.peak_flops is None and precision != "32-true" and accelerator.bfloat16 is None:
            yield (
                f"`trainer.precision` must be 32-true with plan.device={self.plan.device}, which has no bfloat16, but "
                f"is {precision} instead."
            )

    def _check_base(self) -> Iterator[str]:
        """An adapter's cost does not depend on the weights."""
        yield from ()

    def _check_processes(self, world: int) -> Iterator[str]:
        """Only the layout of the ranks; whether they divide the batch is reported beside the figures."""
        yield from self.strategy.problems(world, self.model)

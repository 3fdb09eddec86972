"""Why a run is slow, and the key that changes it: rules over measurements of a stretch of training. No torch."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping

from txtrain.parallel.config import Layout

STEPS, SECONDS = 20, 10.0  # of training, the least that is judged
DATA = 0.15  # share of the training time above which a phase is reported
COMMUNICATION = 0.25
COMPILED_AGAIN = 3  # stretches after the first with a compilation


@dc.dataclass(frozen=True)
class Stretch:
    """Some steps of one rank.

    Attributes:
        seconds: of each phase (`txtrain.parallel.timers`).
        steps: in it.
        mfu: over it.
        on_gpu: or on the CPU.
        processes: of the run.
        micro_batch_size, share: sequences in a micro-batch, and in a step of one rank.
        micro_batch_tokens: of one micro-batch.
        num_workers: of the data.
        cores: of this machine, for each process on it.
        compiled_again: stretches so far with a recompilation.
        layout: of the ranks.
        reshards: whether parameters are gathered again for the backward.
    """

    seconds: Mapping[str, float]
    steps: int
    mfu: float
    on_gpu: bool
    processes: int
    micro_batch_size: int
    share: int
    micro_batch_tokens: int
    num_workers: int
    cores: int
    compiled_again: int = 0
    layout: Layout = Layout()
    reshards: bool = False

    @property
    def training(self) -> float:
        """Seconds of the phases of a step."""
        return sum(taken for name, taken in self.seconds.items() if name not in ("validation", "saving", "other"))

    def share_of(self, phase: str) -> float:
        return self.seconds.get(phase, 0.0) / self.training if self.training > 0 else 0.0


def waits_for_data(s: Stretch) -> str | None:
    if (share := s.share_of("data")) <= DATA:
        return None
    more = max(1, min(2 * s.num_workers or 2, s.cores - 1))
    if more <= s.num_workers:
        remedy = "`txtrain prepare` tokenises ahead of time, and data=memmap reads without work"
    else:
        remedy = (
            f"data.num_workers={more} reads ahead in processes of their own (now {s.num_workers}); "
            "`txtrain prepare` tokenises ahead of time"
        )
    return f"{share:.0%} of a step is waiting for data: {remedy}."


def small_micro_batches(s: Stretch) -> str | None:
    """Too little work at a time for the device, unless the rank's whole share is that small."""
    few = 4096 if s.on_gpu else 512
    if s.mfu >= 0.25 or s.micro_batch_tokens >= few or s.micro_batch_size >= s.share:
        return None
    larger = [n for n in range(s.micro_batch_size + 1, s.share + 1) if s.share % n == 0]
    wanted = next((n for n in larger if s.micro_batch_tokens * n >= few * s.micro_batch_size), s.share)
    return (
        f"micro-batches of {s.micro_batch_size} ({s.micro_batch_tokens:,} tokens) leave the device idle "
        f"(MFU {s.mfu:.0%}): data.micro_batch_size={wanted} does the same step in {s.share // wanted} "
        f"instead of {s.share // s.micro_batch_size}, where memory allows."
    )


def compiles_again(s: Stretch) -> str | None:
    if s.compiled_again < COMPILED_AGAIN:
        return None
    return (
        "blocks are compiled again and again, as shapes change from step to step: "
        "trainer.compile=false, or data of one length (data.packing=concat)."
    )


def waits_for_processes(s: Stretch) -> str | None:
    if s.processes == 1 or (share := s.share_of("communication")) <= COMMUNICATION:
        return None
    if s.layout.tensor > 1:
        remedy = "a smaller strategy.tp_size, within one node"
    elif s.reshards:
        remedy = (
            "strategy.reshard_after_forward=false gathers once where memory allows, "
            "and strategy=hsdp gathers within a node only"
        )
    elif s.layout.shard > 1 and s.layout.replicate == 1:
        remedy = "strategy=ddp where the model fits a device, or strategy=hsdp"
    else:
        remedy = (
            "gradients are exchanged once a step, so that a larger data.global_batch_size in more micro-batches "
            "exchanges less for each token"
        )
    return f"{share:.0%} of a step is communication, and waiting for the slowest process: {remedy}."


RULES: Mapping[str, Callable[[Stretch], str | None]] = {
    "data": waits_for_data,
    "micro-batch": small_micro_batches,
    "compilation": compiles_again,
    "communication": waits_for_processes,
}


def reasons(stretch: Stretch, told: set[str]) -> list[str]:
    """What slows the run. Each cause is reported once: those reported now are added to `told`."""
    if stretch.steps < STEPS or stretch.training < SECONDS:
        return []
    found = {cause: text for cause, rule in RULES.items() if cause not in told and (text := rule(stretch))}
    told.update(found)
    return [f"slow: {text}" for text in found.values()]

"""Monitors a run: speed, phases of its time, memory, goodput; why it is slow; loss spikes; divergence."""

from __future__ import annotations

import dataclasses as dc
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from txtrain.checkpoint.run_folder import RunFolder
from txtrain.checkpoint.state import RunState
from txtrain.config.schema import Train
from txtrain.ground.plain_files import LIMIT, check_file
from txtrain.monitor import slowness
from txtrain.monitor.console import Display
from txtrain.monitor.loss_spikes import Losses, Spike
from txtrain.monitor.slowness import Stretch
from txtrain.monitor.start_screen import count, duration
from txtrain.monitor.throughput import Machine, Meter, memory
from txtrain.parallel.config import Layout
from txtrain.parallel.one_process import OneProcess
from txtrain.parallel.timers import PHASES

SPIKES = "spikes.jsonl"
FAR_OFF = 100  # steps in a row after which a run is reported as diverged


class Training(Protocol):
    """The monitored part of `txtrain.LitModule`. step: completed updates; tokens: trained on, over all ranks."""

    step: int
    parallel: OneProcess

    @property
    def tokens(self) -> int: ...

    @property
    def device(self) -> torch.device: ...


class Diverged(RuntimeError):
    """The loss has been far above its best for more steps than `trainer.max_divergent_steps` allows."""


class Watch:
    """Measures the training without changing it.

    Losses are those of the global batch, so every rank finds the same spikes and the same end. Times and memory are
    this rank's.

    Args:
        folder: None: nothing is written.
        data: a prepared DataModule.
    """

    def __init__(
        self, config: Train, data: Any, folder: RunFolder | None, display: Display, machine: Machine, state: RunState
    ) -> None:
        self.config, self.data, self.folder, self.display, self.machine = config, data, folder, display, machine
        self.meter = Meter(state.seconds)
        self.losses = Losses(state.losses)
        self.times = dict.fromkeys(PHASES, 0.0) | state.times  # over all starts, of the steps that count
        self._writes = False
        self._told: set[str] = set()
        self._stretch: Stretch | None = None  # None: before the first row, which is warm-up
        self._since = 0  # step of the previous row
        self._compiled, self._compiled_again = 0, 0

    def start(self, module: Training) -> None:
        """The model is set up. module.step: steps done before."""
        module.parallel.phases.start(module.device)
        self._writes = self.folder is not None and module.parallel.is_first
        if self._writes and self.folder is not None:
            _keep_until(module.step, self.folder.path / SPIKES)

    def state(self) -> dict[str, Any]:
        """Fields for the checkpoint's `RunState`."""
        return {"seconds": self.meter.seconds, "losses": self.losses.state(), "times": dict(self.times)}

    # -------------------------------------------------------------------------------------------------------- each step

    def step(
        self, module: Training, outputs: Mapping[str, torch.Tensor], tokens: int, flops: float, again: float
    ) -> None:
        """A step is done. tokens, flops, again: of the global batch, see `Meter.count`.

        Raises:
            Diverged: trainer.max_divergent_steps is exceeded.
        """
        self.meter.count(tokens, flops, again)
        spike = self.losses.add(module.step, float(outputs["loss"]))
        if spike is not None:
            self._spike(spike, float(outputs["grad_norm"]))
        self._far_off(module.step)

    def _spike(self, spike: Spike, grad_norm: float) -> None:
        where = ""
        if self._writes and self.folder is not None:
            path = self.folder.path / SPIKES
            where = f"; its samples: {path}"
            told = {"step": spike.step, "loss": spike.loss, "median": spike.median, "grad_norm": grad_norm}
            with open(path, "a", encoding="utf-8") as f:
                f.write(json.dumps(told | {"sample_index": self.data.order.indices(spike.step - 1).tolist()}) + "\n")
        if spike.first:
            self.display.tell(
                f"step {spike.step}: the loss jumps to {spike.loss:.4f} from a median of {spike.median:.4f}{where}",
                style="bold",
            )

    def _far_off(self, step: int) -> None:
        losses, allowed = self.losses, self.config.trainer.max_divergent_steps
        if allowed is not None and losses.far_off > allowed:
            best = "save.keep_best keeps the checkpoint of the best validation; " if self.config.save.keep_best else ""
            raise Diverged(
                f"The run has diverged: the loss of the last {losses.far_off} steps up to {step} is far above its best "
                f"median ({losses.lowest:.4f}), and trainer.max_divergent_steps={allowed} ends it. {best}"
                "fork=CHECKPOINT goes on from one, with a lower optimizer.lr or a trainer.gradient_clip_val; "
                "null never ends a run."
            )
        if losses.far_off == FAR_OFF and allowed is None:
            self.display.tell(
                f"step {step}: the run may have diverged: the loss has been far above its best median "
                f"({losses.lowest:.4f}) for {FAR_OFF} steps. trainer.max_divergent_steps={FAR_OFF} would end it.",
                style="bold",
            )

    # -------------------------------------------------------------------------------------------------- each logged row

    def measures(self, module: Training) -> dict[str, float | None]:
        """This step's columns, measured since the previous row."""
        tokens_per_second, flops, with_again = self.meter.rates()
        size = module.parallel.world.size
        self._measure_again(with_again / size)
        peak = self.machine.peak.flops * size
        row: dict[str, float | None] = {
            "loss_spikes": self.losses.n_spikes,
            "tokens_per_second": tokens_per_second,
            "mfu": flops / peak,
            "hfu": with_again / peak,
            "seconds": self.meter.seconds,
            "goodput": self.goodput(),
            "memory_gib": memory(module.device) / 2**30,
            **self._taken(module),
        }
        self._judge(module, row)
        return row

    def _measure_again(self, flops: float) -> None:
        machine = self.machine.reaching(flops)
        if machine.peak != self.machine.peak:
            self.display.tell(
                f"  device        {machine}; measured again, as the run was faster than the peak measured at its start"
            )
        self.machine = machine

    def add_times(self, module: Training, row: dict[str, Any]) -> None:
        """Add the time since the row was begun, that of a validation."""
        for name, seconds in self._taken(module).items():
            row[name] = row.get(name, 0.0) + seconds

    def _taken(self, module: Training) -> dict[str, float]:
        taken = module.parallel.phases.take()
        for name, seconds in taken.items():
            self.times[name] = self.times.get(name, 0.0) + seconds
        return {f"time/{name}": seconds for name, seconds in taken.items()}

    def goodput(self) -> float | None:
        """Share of the time since the first start that was spent in steps that count; None without a folder."""
        if self.folder is None or self.folder.began is None:
            return None
        return min(1.0, self.meter.seconds / max(time.time() - self.folder.began, 1e-9))

    def _judge(self, module: Training, row: Mapping[str, Any]) -> None:
        """Report why the run is slow, after enough steps. Its warm-up (compilation, caches, workers) is left out."""
        compiled = _compiled()
        if self._stretch is None:
            self._stretch, self._compiled = self._empty(module), compiled
            return
        if compiled > self._compiled:
            self._compiled, self._compiled_again = compiled, self._compiled_again + 1
        before, steps = self._stretch, module.step - self._since
        seconds = {name: before.seconds.get(name, 0.0) + row.get(f"time/{name}", 0.0) for name in self.times}
        whole = before.steps + steps
        mfu = (before.mfu * before.steps + row["mfu"] * steps) / max(whole, 1)
        self._since = module.step
        self._stretch = dc.replace(before, seconds=seconds, steps=whole, mfu=mfu, compiled_again=self._compiled_again)
        if module.parallel.is_first:
            for text in slowness.reasons(self._stretch, self._told):
                self.display.tell(text, style="bold")
        if whole >= slowness.STEPS and self._stretch.training >= slowness.SECONDS:
            self._stretch = self._empty(module)

    def _empty(self, module: Training) -> Stretch:
        config, world = self.config, module.parallel.world
        self._since = module.step
        share = config.data.global_batch_size // module.parallel.size
        micro = min(config.micro_batch_size, share)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Stretch(
            seconds={},
            steps=0,
            mfu=0.0,
            on_gpu=module.device.type == "cuda",
            processes=world.size,
            micro_batch_size=micro,
            share=share,
            micro_batch_tokens=micro * config.seq_len,
            num_workers=config.data.num_workers,
            cores=cores // world.local_size,
            layout=config.strategy.layout(world.size) if world.size > 1 else Layout(),
            reshards=config.strategy.reshard_after_forward,
        )

    # ---------------------------------------------------------------------------------------------------------- the end

    def summary(self, module: Training, metrics: Mapping[str, float]) -> list[tuple[str, str]]:
        """Rows of a table: loss, steps, time and its phases, memory, goodput."""
        self._taken(module)
        whole = sum(self.times.values())
        if not whole or "loss" not in metrics:
            return []
        shares = [
            f"{name.replace('_', '/')} {seconds / whole:.0%}" for name, seconds in self.times.items()
            if seconds / whole >= 0.005
        ]
        validation = f", validation {metrics['val_loss']:.4f}" if "val_loss" in metrics else ""
        rows = [
            ("loss", f"{metrics['loss']:.4f}{validation}"),
            ("trained", f"{module.step:,} steps, {count(module.tokens)} tokens, in {duration(self.meter.seconds)}"),
            ("time", ", ".join(shares)),
            ("memory", f"{memory(module.device) / 2**30:.2f} GiB at most"),
        ]
        good = self.goodput()
        return rows if good is None else [*rows, ("goodput", f"{good:.0%} of the time since the first start")]


def _keep_until(step: int, path: Path) -> None:
    """Remove the lines of later steps, which are done again. The file has a line for each spike, with the numbers of
    the samples of its batch: that of a long run is read a line at a time."""
    if not path.exists():
        return
    check_file(path, limit=None)
    with path.open("r+b") as f:
        kept = 0
        while (line := f.readline(LIMIT)).endswith(b"\n") and _step(line) <= step:
            kept += len(line)
        f.truncate(kept)


def _step(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, RecursionError):  # an unfinished line of a killed run
        return 1 << 62


def _compiled() -> int:
    """Number of graphs that torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])

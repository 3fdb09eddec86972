"""What a step costs more because it is watched: `python -m tests.benchmarks.bookkeeping [STEPS]`.

Trains the laptop's gpt2 on one batch, step by step, watched and not in turn (the time split, the loss's window, the meter, one row in
ten), and prints the median step of each. Beside it the same calls alone, since what they cost is far below what two steps differ by.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch

from txtrain import compose
from txtrain.checkpoint.state import RunState
from txtrain.monitor.console import Display
from txtrain.monitor.monitor import Watch
from txtrain.monitor.throughput import Machine
from txtrain.parallel.timers import Phases
from txtrain.training.run import train


class InTurn(pl.Callback):
    """Switches the watching off in every second step, and keeps the time of each."""

    def __init__(self) -> None:
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.kept: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        phases = module.parallel.phases
        if batch_idx % 2:
            self.kept = dict(phases.__dict__)
            phases.stop()
        elif self.kept:
            phases.__dict__.update(self.kept)
        self.begin = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= 4:  # the first steps are slower
            self.seconds[batch_idx % 2 == 0].append(time.perf_counter() - self.begin)


def alone(n: int = 2000) -> float:
    """Seconds of what one step's watching does, without the step."""
    config: Any = compose(["model=gpt2", "data=python_docs"])
    module = SimpleNamespace(step=0, device=torch.device("cpu"), tokens=0)
    world = SimpleNamespace(size=1, local_size=1)
    module.parallel = SimpleNamespace(phases=Phases(), is_first=True, size=1, world=world)
    watch = Watch(config, None, None, Display(silent=True), Machine.of(module.device, torch.float32), RunState())
    watch.start(module)  # type: ignore[arg-type]
    watch.meter.start()
    outputs = {"loss": torch.tensor(3.0), "grad_norm": torch.tensor(1.0)}
    draws = torch.rand(n) + 3
    begin = time.perf_counter()
    for i in range(n):
        module.step += 1
        outputs["loss"] = draws[i]
        for phase in ("forward_backward", "optimizer", "other"):
            module.parallel.phases.enter(phase)
        watch.step(module, outputs, 2048, 1.0, 0.0)  # type: ignore[arg-type]
        if i % 10 == 9:
            watch.measures(module)  # type: ignore[arg-type]
        module.parallel.phases.enter("data")
    return (time.perf_counter() - begin) / n


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    watching = InTurn()
    with tempfile.TemporaryDirectory() as folder:
        keys = ["model=gpt2", "data=python_docs", f"trainer.max_steps={steps}", "trainer.limit_val_batches=0", "save.every_n_steps=100000"]
        config: Any = compose([*keys, f"run_dir={Path(folder) / 'run'}", "verbosity=quiet"])
        train(config, callbacks=[watching])
    step = {on: statistics.median(times) for on, times in watching.seconds.items()}
    calls = alone()
    more = step[True] / step[False] - 1
    print(f"step: {1000 * step[True]:.2f} ms watched, {1000 * step[False]:.2f} ms not ({more:+.2%}), {len(watching.seconds[True])} each")
    print(f"the calls alone: {1e6 * calls:.0f} us, {calls / step[False]:.3%} of a step")


if __name__ == "__main__":
    main()

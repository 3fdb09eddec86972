"""What metrics.csv and W&B (offline) cost a step: one run whose blocks of steps take turns without a row, with one in ten steps (the default), at every step.

    python -m tests.benchmarks.logging_cost [OVERRIDE...]       by default model=mistral data=python_docs data.global_batch_size=1

A step is timed from its start to the next one's, what is between steps included: by the clock, and by what the training's thread
computed, which others on the machine hardly change. Blocks of a round are neighbours in time; a block
counts by its mean, rounds by their median.
"""

import dataclasses as dc
import os
import statistics
import sys
import tempfile
import time

import lightning.pytorch as pl

import txtrain
from txtrain.training.callback import RunCallback

ROUNDS, BLOCK, BEFORE = 30, 10, 20
ARMS = {"no row": 10**9, "a row every 10 steps": 10, "a row every step": 1}


class TakingTurns(pl.Callback):
    """Changes how often the recorder makes a row, and times the steps of each arm."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in ARMS}  # of each round's block: clock and thread
        self._arm, self._began = "", (0.0, 0.0)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        now, done = (time.perf_counter(), time.thread_time()), module.step - BEFORE
        if done < 0:
            return
        if done and (done - 1) % BLOCK:  # the first step of a block stands under the sign of the one before
            self.seconds[self._arm][-1].append((now[0] - self._began[0], now[1] - self._began[1]))
        self._began = now
        if done % BLOCK == 0:
            order = [*ARMS][:: 1 if done // BLOCK // len(ARMS) % 2 else -1]  # forth and back: drifts cancel
            self._arm = order[done // BLOCK % len(ARMS)]
            self.seconds[self._arm].append([])
            (recorder,) = (c for c in trainer.callbacks if isinstance(c, RunCallback))
            recorder.config = dc.replace(recorder.config, trainer=dc.replace(recorder.config.trainer, log_every_n_steps=ARMS[self._arm]))


def main() -> None:
    os.environ |= {"WANDB_MODE": "offline"}
    given = sys.argv[1:] or ["model=mistral", "data=python_docs", "data.global_batch_size=1"]
    with tempfile.TemporaryDirectory() as folder:
        fixed = [
            f"run_dir={folder}/run",
            "logger=wandb",
            f"trainer.max_steps={BEFORE + ROUNDS * BLOCK * len(ARMS)}",
            "trainer.val_check_interval=1000000",
            "trainer.limit_val_batches=0",
            "save.every_n_steps=1000000",
        ]
        turns = TakingTurns()
        txtrain.train(txtrain.compose([*given, *fixed]), callbacks=[turns])
    for i, what in enumerate(("clock", "thread")):
        typical = {name: [statistics.fmean(step[i] for step in block) for block in blocks if block][:ROUNDS] for name, blocks in turns.seconds.items()}
        without = typical.pop("no row")
        for name, values in typical.items():
            ratios = [a / b - 1 for a, b in zip(values, without, strict=True)]
            error = statistics.stdev(ratios) / len(ratios) ** 0.5
            print(
                f"{what:>7}, {name}: {statistics.median(values) * 1e3:.1f} ms a step, {statistics.median(without) * 1e3:.1f} without: "
                f"{statistics.median(ratios):+.2%} (mean {statistics.fmean(ratios):+.2%}, standard error {error:.2%}, {len(ratios)} rounds)"
            )


if __name__ == "__main__":
    main()

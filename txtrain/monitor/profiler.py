"""`profile=true`: a trace of a few steps by torch.profiler, in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from txtrain.checkpoint.run_folder import RunFolder
from txtrain.config.schema import Train
from txtrain.monitor.console import Display
from txtrain.monitor.monitor import Training

FOLDER = "profile"
WARM_UP, N_STEPS, N_OPERATORS = 3, 3, 10  # by default: steps before the trace, steps in it; operators that are shown


class Profiled(pl.Callback):
    """Each rank traces its own steps, for https://ui.perfetto.dev or chrome://tracing, as `steps_4_6_rank0.json.gz` in
    `profile/`, and beside it the costliest operators as text. A run that stops earlier leaves the steps it made.

    Args:
        folder: None: only the operators are shown.
    """

    def __init__(self, config: Train, folder: RunFolder | None, display: Display) -> None:
        self.config, self.folder, self.display = config, folder, display
        self.first = self.last = self.done = 0
        self._profiler: torch.profiler.profile | None = None
        self._step: Any = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        done = module.step
        self.first, self.last = self.config.profile_steps or (done + WARM_UP + 1, done + WARM_UP + N_STEPS)
        self.first = max(self.first, done + 1)
        if self.first > self.last:
            self.display.tell(
                f"profile_steps=[{self.config.profile_steps[0]},{self.last}] "  # type: ignore[index]
                "are done already: nothing is traced."
            )

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        step = module.step + 1
        if step == self.first <= self.last:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if module.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
            module.parallel.phases.labelled = True
        if self._profiler is not None:
            self._step = torch.profiler.record_function(f"step {step}")
            self._step.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._end_step()
        if self._profiler is not None:
            self.done = module.step
            if module.step >= self.last:
                self._finish(module)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self._profiler is not None:
            self._finish(module)
        elif self.done == 0 and self.first <= self.last:
            self.display.tell(
                f"profile: the run ended before step {self.first}: nothing is traced. "
                "profile_steps=[FIRST,LAST] sets the steps."
            )

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        self._end_step()
        if self._profiler is not None:
            self._finish(module)

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _finish(self, module: Training) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        module.parallel.phases.labelled = False
        profiler.stop()
        if not self.done:
            return
        rows = costliest(profiler)
        where = "; trainer.fast_dev_run keeps no trace"
        if self.folder is not None:
            path = self._write(profiler, rows, self.folder.path / FOLDER, module.parallel.world.rank)
            where = f": {path}, for https://ui.perfetto.dev"
        self.display.tell(f"profile of steps {self.first} to {self.done}{where}", style="bold")
        self.display.table([("ms a step", "share  calls  operator"), *((ms, text) for ms, text in self._shown(rows))])

    def _write(
        self, profiler: torch.profiler.profile, rows: list[tuple[str, int, float]], folder: Path, rank: int
    ) -> Path:
        folder.mkdir(exist_ok=True)
        name = f"steps_{self.first}_{self.done}_rank{rank}"
        profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
        text = "\n".join(
            f"{ms:>12}  {rest}"
            for ms, rest in [("ms a step", "share  calls  operator"), *self._shown(rows, n=len(rows))]
        )
        (folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
        return folder / f"{name}.json.gz"

    def _shown(self, rows: list[tuple[str, int, float]], n: int = N_OPERATORS) -> list[tuple[str, str]]:
        whole = sum(seconds for *_, seconds in rows) or 1.0
        steps = self.done - self.first + 1
        return [
            (f"{1000 * seconds / steps:.2f}", f"{seconds / whole:>5.1%}  {calls / steps:>5.0f}  {name}")
            for name, calls, seconds in rows[:n]
        ]


def costliest(profiler: torch.profiler.profile) -> list[tuple[str, int, float]]:
    """Operators, calls, and seconds without callees: on the device if one computed, else on the CPU."""
    events = [e for e in profiler.key_averages() if not e.is_user_annotation]
    on_device = any(e.self_device_time_total for e in events)
    found = [
        (str(e.key), int(e.count), (e.self_device_time_total if on_device else e.self_cpu_time_total) / 1e6)
        for e in events
    ]
    return sorted((row for row in found if row[2] > 0), key=lambda row: -row[2])

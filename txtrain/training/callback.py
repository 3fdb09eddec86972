"""What happens between two steps: the row of metrics.csv, validation results, samples, the checkpoint, the end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch

from txtrain.checkpoint.run_folder import RunFolder
from txtrain.checkpoint.state import RunState
from txtrain.config.schema import Train
from txtrain.data.store.stream_position import furthest, positions
from txtrain.ground import files
from txtrain.ground.plain_files import decode, read_bytes
from txtrain.model.ffn import balancing
from txtrain.monitor.console import Display
from txtrain.monitor.loggers.build import Loggers
from txtrain.monitor.metrics_csv import MetricsFile
from txtrain.monitor.monitor import Watch
from txtrain.monitor.throughput import Machine
from txtrain.objectives.base import Shown
from txtrain.planning.trained import work
from txtrain.training.columns import columns_of
from txtrain.training.deadline import Deadline
from txtrain.training.limits import Limits
from txtrain.training.module import LitModule
from txtrain.training.saves import Saves
from txtrain.training.signals import Preempted, Stop
from txtrain.training.tasks import Task


class RunCallback(pl.Callback):
    """Closes each step once: row, then samples, then checkpoint, in that order, and ends the run where it must.

    A step at which a validation is due is closed after it. An interrupt in between saves the step with its open row;
    the resumed run first validates and closes it, so its files equal those of an uninterrupted run.

    Args:
        folder: None: nothing is written.
        data: a DataModule that is prepared.
        columns: of metrics.csv, those of the objective.
        tasks: evaluated with the validation.
        stop: owns the signals.
        deadline: of the job.
    """

    def __init__(
        self,
        config: Train,
        data: Any,
        folder: RunFolder | None,
        limits: Limits,
        display: Display,
        machine: Machine,
        loggers: Loggers,
        stop: Stop,
        deadline: Deadline,
        columns: Sequence[str],
        generation_file: bytes,
        tasks: Sequence[Task] = (),
    ) -> None:
        self._generation_file = generation_file
        self.config, self.data, self.folder, self.limits = config, data, folder, limits
        self.display, self.loggers, self.stop, self.deadline = display, loggers, stop, deadline
        self.state = folder.state if folder else RunState()
        self.watch = Watch(config, data, folder, display, machine, self.state)
        self.meter = self.watch.meter
        self.open: dict[str, Any] | None = self.state.open_row  # of a step that is not closed yet
        self.metrics: dict[str, float] = {}  # of each column, its latest value
        self.position: Any = None  # where the next step is read from, in a stream
        self.tasks = tasks
        self.saves: Saves | None = None  # from the start of the fit, where there is a folder
        self.stopping = self.state.stopping
        self.ended = False
        self.columns = columns_of(config, columns, data, tasks)
        self._file: MetricsFile | None = None
        self._works: dict[tuple[int, int], tuple[int, float, float]] = {}  # by the lengths of a batch, see `_work`

    # -------------------------------------------------------------------------------------------------------- the start

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = _lit(pl_module)
        self.columns += module.layers.columns
        module.objective.check = partial(self._check, module)
        if self.folder is None:
            self.watch.start(module)
            return
        self.saves = Saves(module, self.config, self.data, self.folder, self.display, self.loggers, self.watch)
        if self.folder.source is not None:
            module.skipped, module.skipped_in_a_row = self.state.skipped
            self.data.start_step = module.step
            if self.state.stream_position is not None:
                self.position = positions(self.state.stream_position, self.data.order.n_readers)
                self.data.start_position = self.position
            _continue_counting(trainer, module.step)
        self.watch.start(module)
        if not module.parallel.is_first:
            return
        self._file = MetricsFile(
            self.folder.path / "metrics.csv", self.columns, keep=module.step - (self.open is not None),
            n_kept=self.state.rows,
        )
        self.metrics = self._file.latest
        samples = self.folder.path / "samples.txt"
        there = self.folder.checkpoint is not None and samples.exists()
        kept = read_bytes(samples, 1 << 30)[: self.state.samples_size] if there else b""
        files.write(samples, decode(kept, str(samples)))

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.hold()  # Lightning has just set its own handlers

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.hold()
        self.display.start(_lit(pl_module).step, self.limits.steps)
        self.meter.start()
        _lit(pl_module).parallel.phases.enter("data")

    # -------------------------------------------------------------------------------------------------- after each step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        _lit(pl_module).parallel.phases.enter("forward_backward")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _lit(pl_module).parallel.phases.enter("other")
        self._end_step(trainer, _lit(pl_module), outputs, batch)
        _lit(pl_module).parallel.phases.enter("data")

    def _end_step(self, trainer: pl.Trainer, module: LitModule, outputs: Any, batch: Any) -> None:
        trainer_config = self.config.trainer
        if "stream_position" in batch:
            self.position = batch["stream_position"][-1]
        if self.saves is not None:
            self.saves.prepare(module)
        self.display.step(module.step)
        self.watch.step(module, outputs, *self._work(module, batch))
        if module.skipped_in_a_row:
            self._skipped(module, outputs)
        if self._reached(module):
            trainer.should_stop = True
        last = trainer.should_stop
        validates = self._validates and (last or module.step % trainer_config.val_check_interval == 0)
        stopping = self._stopping(module)
        if validates or last or module.step % trainer_config.log_every_n_steps == 0:
            self.open = self._row(module, outputs)
        if validates:
            if stopping:
                self._leave(module)
            return
        self._close(trainer, module)

    def _stopping(self, module: LitModule) -> bool:
        """Whether the run ends here: a rank was asked to, or the job ends soon by rank 0's clock. Collective."""
        if module.parallel.is_first and self.deadline.near(self.saves.longest if self.saves else 0.0):
            assert self.deadline.end is not None
            self.stop.end_is_near(self.deadline.end)
        return self.stop.agree(module.parallel.most)

    def _skipped(self, module: LitModule, outputs: Mapping[str, torch.Tensor]) -> None:
        """Report a skipped step. After too many in a row raise FloatingPointError; the run's folder names the batch."""
        n, allowed = module.skipped_in_a_row, self.config.trainer.max_skipped_steps
        what = f"loss {float(outputs['loss'])}, gradient norm {float(outputs['grad_norm'])}"
        if n <= allowed:
            self.display.tell(f"step {module.step} is skipped: {what} ({n} in a row, {allowed} allowed)", style="bold")
            return
        where = ""
        if self.folder is not None and module.parallel.is_first:
            path = self.folder.path / "nonfinite.json"
            files.write(
                path,
                json.dumps({
                    "step": module.step, "sample_index": self.data.order.indices(module.step - 1).tolist(),
                    **_floats(outputs),
                }),
            )
            where = f" The samples of this step: {path}."
        raise FloatingPointError(
            f"Step {module.step} is not finite: {what}"
            + (f", after {n - 1} others in a row" if n > 1 else "") + f".{where} "
            "Try a lower optimizer.lr, more scheduler.warmup_steps, or trainer.precision=32-true."
        )

    def _reached(self, module: LitModule) -> bool:
        """Whether the run is over. Ranks agree where a time limit decides, as their clocks may differ."""
        reached = self.limits.reached(module.step, self.meter.seconds)
        return reached if self.limits.seconds is None else module.parallel.any(reached)

    @property
    def _validates(self) -> bool:
        return self.config.trainer.limit_val_batches > 0 and self.data.n_val > 0

    def _work(self, module: LitModule, batch: Any) -> tuple[int, float, float]:
        """Token positions, FLOPs, and recomputed FLOPs of a step whose batches have this shape on every rank."""
        lengths = module.objective.lengths(batch, self.config.seq_len)
        if lengths not in self._works:  # counting may build a user's own component
            n, frozen = self.config.data.global_batch_size, module.frozen
            longer = max(lengths) if self.config.model.topology == "encoder_decoder" else lengths[0]
            of_sample = work(self.config, lengths, (lambda name: name not in frozen) if frozen else None)
            self._works[lengths] = n * longer, n * of_sample.once, n * of_sample.again
        return self._works[lengths]

    def _row(self, module: LitModule, outputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The columns that need no validation. Waits for the device."""
        loss = float(outputs["loss"])
        return {
            "step": module.step,
            "tokens": module.tokens,
            "loss": loss,
            "lr": self.config.optimizer.lr * module.schedule(module.step),
            "grad_norm": float(outputs["grad_norm"]),
            "skipped_steps": module.skipped,
            **{
                name: float(outputs[name])
                for name in (*module.objective.terms, *balancing.columns(self.config.model))
            },
            **module.objective.of_step,
            **{name: float(outputs[name]) for name in module.layers.columns if name in outputs},
            **self.data.measures(module.step),
            **self.watch.measures(module),
        }

    # ------------------------------------------------------------------------------------------------------- validation

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _lit(pl_module).parallel.phases.enter("validation")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._check(_lit(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = _lit(pl_module)
        assert self.open is not None
        shown = module.objective.show(module, self.data, self.config, check=lambda: self._check(module))
        measured = self._evaluate_tasks(module)
        module.average.swap_out()
        module.parallel.phases.enter("other")
        self.open |= module.val_metrics | measured
        self.watch.add_times(module, self.open)
        self._close(trainer, module, shown)
        self.meter.start()
        module.parallel.phases.enter("data")

    def _evaluate_tasks(self, module: LitModule) -> dict[str, float]:
        every = self.config.trainer.eval_tasks_interval
        last = module.trainer.should_stop or self._reached(module)
        if not self.tasks or (every is not None and module.step % every and not last):
            return {}
        check = partial(self._check, module)
        found: dict[str, float] = {}
        module.model.eval()
        for task in self.tasks:
            size = self.config.micro_batch_size
            found |= task.figures(module.model, module.parallel, module.device, size, check)
        module.model.train()
        found = module.parallel.first(lambda: found)
        self.display.tell("eval tasks: " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
        return found

    def _check(self, module: LitModule) -> None:
        if self._stopping(module):
            self._leave(module)

    # ------------------------------------------------------------------------------------------------ the end of a step

    def _close(self, trainer: pl.Trainer, module: LitModule, shown: Sequence[Shown] = ()) -> None:
        """The step is complete: write its row and samples, save if it is time, stop if it was asked for."""
        row, self.open = self.open, None
        scored = self._scored(row or {})
        if row is not None:
            self._write_row(row)
        if shown:
            self._write_samples(module, shown)
        exhausted = self._exhausted(row or {})
        self.ended = trainer.should_stop = trainer.should_stop or self._reached(module) or exhausted
        if self.saves is not None and self.saves.due(module.step, scored, self.ended):
            self._save(module, scored, must=self.ended)
            self.meter.start()
        if not self.ended and self._stopping(module):
            self._leave(module)

    def _scored(self, row: Mapping[str, Any]) -> dict[str, float]:
        """What a checkpoint says of its step's validation."""
        names = "val_loss", self.config.save.metric
        return {name: row[name] for name in names if row.get(name) is not None}

    def _exhausted(self, row: Mapping[str, Any]) -> bool:
        """Whether trainer.stop_after ends the run here; counts the values without a gain."""
        stop = self.config.trainer.stop_after
        value = row.get(stop.metric)
        if stop.patience is None or value is None:
            return False
        best, since = self.stopping or (math.inf, 0.0)
        gained = stop.sign * value < best - stop.min_gain
        self.stopping = [stop.sign * value, 0.0] if gained else [best, since + 1]
        if self.stopping[1] < stop.patience:
            return False
        at_best = f"{stop.metric} {stop.sign * best:.6g}"
        self.display.tell(f"no gain over {at_best} in {stop.patience} values: the run ends (trainer.stop_after)")
        return True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the best weights, if that is asked for."""
        if self.config.save.load_best and self.saves is not None and self.ended:
            self.saves.load_best(_lit(pl_module))

    on_sanity_check_end = on_train_end  # of a last validation that an interrupt had cut short: no training follows

    def _leave(self, module: LitModule) -> None:
        """Save and end the run here, whether this step's row is open or closed."""
        module.average.swap_out()
        saved = self.saves is None or self.saves.has(module.step)
        if not module.parallel.first(lambda: self.open is None and saved):
            self._save(module, {}, must=True)
        raise Preempted

    def _write_row(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(row)
        else:
            self.metrics |= {name: value for name, value in row.items() if value is not None}
        self.display.row(row)
        self.loggers.row(row["step"], {name: row[name] for name in self.columns[1:] if row.get(name) is not None})

    def _write_samples(self, module: LitModule, shown: Sequence[Shown]) -> None:
        if self._file is None and self.folder is not None:  # another rank writes
            return
        for one in shown:
            self.display.text(one.text)
        self.loggers.samples(module.step, module.tokens, shown)
        if self.folder is not None:
            with open(self.folder.path / "samples.txt", "a", encoding="utf-8") as f:
                f.write("".join(f"--- step {module.step}\n{one.text}\n\n" for one in shown))

    def _save(self, module: LitModule, scored: dict[str, float], must: bool) -> None:
        """must: the run ends with it, so a failure is raised."""
        if self.saves is None or self.folder is None:
            return
        with module.parallel.phases.within("saving"):
            self.deadline.pause()
            at = None if self.position is None else torch.as_tensor(self.position).tolist()
            samples = self.folder.path / "samples.txt"
            if self._file is not None:
                self._file.sync()
                files.sync(samples)
            state = RunState(
                step=module.step, tokens=module.tokens, samples=module.samples,
                **self.watch.state(),
                data_order_hash=self.data.order_hash(module.step),
                data_fingerprint=self.data.fingerprint,
                stream_position=None if at is None else furthest(module.parallel.gathered(at)),
                samples_size=samples.stat().st_size if samples.exists() else 0,
                metrics=scored,
                stopping=self.stopping,
                weights_only=self.config.save.weights_only_last and self.ended,
                open_row=self.open,
                skipped=(module.skipped, module.skipped_in_a_row),
                averaged=module.average.begun,
                rows=self._file.n_rows if self._file is not None else None,
                rows_hash=self._file.hash if self._file is not None else "",
            )
            self.saves.save(module, state, self._generation_file, must)

    # ---------------------------------------------------------------------------------------------------------- the end

    def close(self) -> None:
        """Finish what is being written."""
        self.display.stop()
        if self.saves is not None:
            self.saves.wait()
        if self._file is not None:
            self._file.close()


def _floats(outputs: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {name: str(float(value)) for name, value in outputs.items()}  # JSON has no NaN or infinity


def _continue_counting(trainer: pl.Trainer, step: int) -> None:
    """Set Lightning's counters as if it had made the first `step` steps: its limits and intervals depend on them."""
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = step
    for progress in (loop.batch_progress.total, loop.manual_optimization.optim_step_progress.total):
        for name in vars(progress):
            setattr(progress, name, step)


def _lit(module: pl.LightningModule) -> LitModule:
    assert isinstance(module, LitModule)
    return module

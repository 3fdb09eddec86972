"""What happens between two steps: the row, the validation's results, the samples, the checkpoint, the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from txtrain import balance, checkpoint, files
from txtrain.config import Train
from txtrain.data.stream import Position
from txtrain.errors import ConfigError
from txtrain.folder import RunFolder
from txtrain.limits import Limits
from txtrain.metrics import COLUMNS, MetricsFile
from txtrain.module import LitModule
from txtrain.objectives.build import build_objective
from txtrain.progress import Display
from txtrain.stop import Preempted, Stop
from txtrain.throughput import Machine, Meter


class Recorder(pl.Callback):
    """Closes each step once: row, then samples, then checkpoint, in that order, and ends the run where it must.

    A step at which a validation is due is closed after it. An interrupt in between saves the step with its open row; the resumed run
    validates first and closes it then, so that nothing tells an interrupted run from another.

    Args:
        folder: None: nothing is written.
        data: a DataModule that is prepared.
    """

    def __init__(self, config: Train, data: Any, folder: RunFolder | None, limits: Limits, display: Display, machine: Machine) -> None:
        self.config, self.data, self.folder, self.limits = config, data, folder, limits
        self.display, self.machine = display, machine
        self.stop = Stop()  # replaced by the one that owns the signals, where there is one
        self.state: dict[str, Any] = folder.state if folder else {}
        self.meter = Meter(self.state.get("seconds", 0.0))
        self.open: dict[str, Any] | None = self.state.get("open_row")  # of a step that is not closed yet
        self.metrics: dict[str, float] = {}  # of each column, its latest value
        self.position: Any = None  # of a stream, where the next step can be read from
        self.best = math.inf
        self.ended = False
        self.columns = COLUMNS + build_objective(config).columns + balance.columns(config.model) + data.columns
        self._file: MetricsFile | None = None

    # ------------------------------------------------------------------------------------------------------------ the start

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = _lit(pl_module)
        if self.folder is None:
            return
        if self.folder.checkpoint is not None:
            checkpoint.load_training(self.folder.checkpoint, module.model, trainer.optimizers[0])
            module.step = self.state["step"]
            self.data.start_step = module.step
            if self.state.get("stream_position"):
                self.data.start_position = Position(*self.state["stream_position"])
                self.position = self.data.start_position
            _continue_counting(trainer, module.step)
        losses = [checkpoint.read_state(path)["metrics"].get("val_loss") for path in checkpoint.complete(self.folder.path)]
        self.best = min((loss for loss in losses if loss is not None), default=math.inf)
        self._file = MetricsFile(self.folder.path / "metrics.csv", self.columns, keep=module.step - (self.open is not None))
        self.metrics = self._file.latest
        samples = self.folder.path / "samples.txt"
        kept = samples.read_bytes()[: self.state["samples_size"]] if module.step and samples.exists() else b""
        files.write(samples, kept.decode())

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.hold()  # Lightning took the signals just before

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.hold()
        self.display.start(_lit(pl_module).step, self.limits.steps)
        self.meter.start()

    # ------------------------------------------------------------------------------------------------------- after each step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        module, trainer_config = _lit(pl_module), self.config.trainer
        if "stream_position" in batch:
            self.position = batch["stream_position"][-1]
        self.meter.count(module.objective.positions(batch, self.config.seq_len) * trainer.world_size)
        self.display.step(module.step)
        if self.limits.reached(module.step, self.meter.seconds):
            trainer.should_stop = True
        last = trainer.should_stop
        validates = self._validates and (last or module.step % trainer_config.val_check_interval == 0)
        stopping = module.parallel.any(self.stop.requested)
        if validates or last or module.step % trainer_config.log_every_n_steps == 0:
            self.open = self._row(module, outputs)
        if validates:
            if stopping:
                self._leave(module)
            return
        self._close(trainer, module)

    @property
    def _validates(self) -> bool:
        return self.config.trainer.limit_val_batches > 0 and self.data.n_val > 0

    def _row(self, module: LitModule, outputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """What is known of the step without a validation. Waits for the device."""
        loss = float(outputs["loss"])
        if not math.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss} at step {module.step}. Try a lower optimizer.lr, more scheduler.warmup_steps, or 32-true.")
        rate = self.meter.rate()
        return {
            "step": module.step,
            "tokens": module.tokens,
            "loss": loss,
            "lr": self.config.optimizer.lr * module.schedule(module.step),
            "grad_norm": float(outputs["grad_norm"]),
            **{name: float(outputs[name]) for name in (*module.objective.weights, *balance.columns(self.config.model)) if name != "loss"},
            **self.data.measures(module.step),
            "tokens_per_second": rate,
            "mfu": rate * self.config.model.flops_per_token(*self.config.lengths) / self.machine.peak.flops,
            "seconds": self.meter.seconds,
        }

    # --------------------------------------------------------------------------------------------------------- validation

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._check(_lit(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = _lit(pl_module)
        assert self.open is not None
        texts = module.objective.show(module, self.data, self.config, check=lambda: self._check(module))
        self.open |= module.val_metrics
        self._close(trainer, module, texts)
        self.meter.start()

    def _check(self, module: LitModule) -> None:
        if module.parallel.any(self.stop.requested):
            self._leave(module)

    # ---------------------------------------------------------------------------------------------------- the end of a step

    def _close(self, trainer: pl.Trainer, module: LitModule, texts: list[str] | None = None) -> None:
        """The step is complete: write what belongs to it, save if it is time, stop if it was asked for."""
        row, self.open = self.open, None
        val_loss = row.get("val_loss") if row else None
        if row is not None:
            self._write_row(trainer, row)
        if texts:
            self._write_samples(module.step, texts)
        self.ended = trainer.should_stop = trainer.should_stop or self.limits.reached(module.step, self.meter.seconds)
        better = val_loss is not None and val_loss < self.best
        self.best = min(self.best, math.inf if val_loss is None else val_loss)
        if self.ended or (better and self.config.save.keep_best) or module.step % self.config.save.every_n_steps == 0:
            self._save(module, val_loss)
            self.meter.start()
        if not self.ended and module.parallel.any(self.stop.requested):
            self._leave(module)

    def _leave(self, module: LitModule) -> None:
        """Save and end the run where it is, this step's row open or closed."""
        if self.folder is not None and not (self.open is None and checkpoint.is_complete(checkpoint.path_of(self.folder.path, module.step))):
            self._save(module, None)
        raise Preempted

    def _write_row(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(row)
        else:
            self.metrics |= {name: value for name, value in row.items() if value is not None}
        self.display.row(row)
        for logger in trainer.loggers:
            logger.log_metrics({name: row[name] for name in self.columns[1:] if row.get(name) is not None}, step=row["step"])

    def _write_samples(self, step: int, texts: list[str]) -> None:
        for text in texts:
            shown = " ".join(text.split())
            self.display.line(f"  {shown[:160]}{'...' if len(shown) > 160 else ''}", style="dim")
        if self.folder is not None:
            with open(self.folder.path / "samples.txt", "a", encoding="utf-8") as f:
                f.write("".join(f"--- step {step}\n{text}\n\n" for text in texts))

    def _save(self, module: LitModule, val_loss: float | None) -> None:
        if self.folder is None:
            return
        folder, path = self.folder, checkpoint.path_of(self.folder.path, module.step)
        assert self._file is not None
        self._file.sync()
        files.sync(folder.path / "samples.txt")
        order = self.data.order_hash(module.step)
        state = {
            "step": module.step,
            "tokens": module.tokens,
            "samples": module.samples,
            "seconds": self.meter.seconds,
            "data_order_hash": order,
            "data_fingerprint": self.data.fingerprint,
            "stream_position": None if self.position is None else [int(n) for n in self.position],
            "samples_size": (folder.path / "samples.txt").stat().st_size,
            "metrics": {} if val_loss is None else {"val_loss": val_loss},
            "open_row": self.open,
        }
        optimizer = module.trainer.optimizers[0]
        checkpoint.save(path, checkpoint.training_tensors(module.model, optimizer), state, beside=self._beside)
        checkpoint.rotate(folder.path, self.config.save.keep_last, self.config.save.keep_best)
        folder.update(data_order_hash=order, step=module.step)

    def _beside(self, path: Path) -> None:
        assert self.folder is not None
        self.folder.write_config(self.config, path)
        if self.data.tokenizer is not None:
            self.data.tokenizer.save(path / "tokenizer")

    # ---------------------------------------------------------------------------------------------------------------- the end

    def close(self) -> None:
        self.display.stop()
        if self._file is not None:
            self._file.close()


def check_data(folder: RunFolder, data: Any) -> None:
    """Refuse to continue a run on other data.

    Raises:
        ConfigError: text, tokenizer or packing are not those of the checkpoint.
    """
    state = folder.state
    if data.fingerprint != state["data_fingerprint"] or data.order_hash(state["step"]) != state["data_order_hash"]:
        raise ConfigError(
            f"`data` must be what {folder.path} was trained on (fingerprint {state['data_fingerprint']}), but is {data.fingerprint} instead: "
            "the files have changed. Restore them, or train anew in another run_dir."
        )


def _continue_counting(trainer: pl.Trainer, step: int) -> None:
    """Set Lightning's counters as if it had made the first `step` steps: its limits and intervals count from them."""
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = step
    for progress in (loop.batch_progress.total, loop.manual_optimization.optim_step_progress.total):
        for name in vars(progress):
            setattr(progress, name, step)


def _lit(module: pl.LightningModule) -> LitModule:
    assert isinstance(module, LitModule)
    return module

"""The checkpoints of a run: the one that it continues from, when the next is due, what is in it, which stay."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint import save as saving
from txtrain.checkpoint.restore import Reading
from txtrain.checkpoint.run_folder import RunFolder
from txtrain.checkpoint.saver import Saver
from txtrain.checkpoint.state import RunState
from txtrain.config.schema import Train
from txtrain.ground.slurm import Job
from txtrain.hf import generation_config
from txtrain.monitor.console import Display
from txtrain.monitor.loggers.build import Loggers
from txtrain.monitor.monitor import Watch
from txtrain.training.module import LitModule

SLOW_DISK = 100e6  # bytes per second: a file system that many nodes share


class Saves:
    """What a run's checkpoints are made of, and when. Loads the one that the run continues from.

    Args:
        module: laid over the processes, with its optimizer.
        data: a DataModule that is prepared.
    """

    def __init__(
        self, module: LitModule, config: Train, data: Any, folder: RunFolder, display: Display, loggers: Loggers,
        watch: Watch,
    ) -> None:
        self.config, self.data, self.folder = config, data, folder
        self.display, self.loggers, self.watch = display, loggers, watch
        self._base, self._writes = module.base, module.parallel.is_first
        self._saver = Saver(module.parallel.checkpoint_group, config.save.async_, self._saved, self._warn)
        # Until a save has been timed: the weights and two moments, at the speed of a slow disk.
        guess = 4 * (module.n_params + 2 * module.n_trained) / module.parallel.world.size / SLOW_DISK
        self._saver.longest = self.folder.state.save_seconds or guess
        if self.folder.source is not None:
            how = Reading(self.folder.key, self.config.save.verify, finite=not self.config.allow_nonfinite)
            optimizer = module.trainer.optimizers[0]
            module.parallel.load(self.folder.source, module.model, optimizer, module.average, how)
            if (path := self.folder.checkpoint) is not None:
                models, load = module.objective.models, module.parallel.load_read
                module.objective.moved = frozenset(key for key in sorted(models) if load(path, key, models[key], how))
            checkpoint.forget_headers()
            module.step = self.folder.first_step
            if self.folder.checkpoint is not None:
                module.objective.load_state(self.folder.checkpoint)
        self._first_step = module.step  # updates before this start
        scores = saving.scores(self.folder.path, self.config.save)
        # of save.metric, lower for better
        self.best = min((score for score in scores.values() if score is not None), default=math.inf)
        self._told: set[str] = set()  # what could not be removed
        self._tell_left(folder.left)
        for path in checkpoint.complete(self.folder.path):
            if path not in scores:
                self._warn(f"{path} is damaged. It is left in place; save.keep_last and keep_best do not count it.")

    @property
    def longest(self) -> float:
        """Seconds of the longest save."""
        return self._saver.longest

    def prepare(self, module: LitModule) -> None:
        """Allocate ahead of the first save what it copies to."""
        if module.parallel.saves_in_place:
            self._saver.prepare(partial(_tensors, module))

    def due(self, step: int, scored: Mapping[str, float], ended: bool) -> bool:
        """Whether a step with these validation figures is saved: the last, every so many, and each better one."""
        keep = self.config.save
        score = keep.sign * scored.get(keep.metric, math.inf * keep.sign)
        better = score < self.best
        self.best = min(self.best, score)
        return ended or (better and bool(keep.keep_best)) or step % keep.every_n_steps == 0

    def has(self, step: int) -> bool:
        """Whether the checkpoint of a step is complete. Waits for one that is being written."""
        self.wait()
        return checkpoint.is_complete(checkpoint.path_of(self.folder.path, step))

    def save(self, module: LitModule, state: RunState, generation_file: bytes, must: bool) -> None:
        """Write a checkpoint, or begin to. must: it is complete on return, or SaveError is raised. Collective.

        Args:
            state: all but what the optimizer and the saves before know.
        """
        tensors = _tensors(module)
        if state.weights_only:
            tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(("model.", "ema."))}
        numbers = module.parallel.training_numbers(module.model, module.trainer.optimizers[0])
        state = dc.replace(state, save_seconds=self.longest, optimizer={} if state.weights_only else numbers)
        beside = partial(self._beside, module.objective.state(), generation_file)
        self._saver.save(checkpoint.path_of(self.folder.path, module.step), tensors, state, beside, must)

    def load_best(self, module: LitModule) -> None:
        """Load the weights of the best checkpoint, and say which."""
        self.wait()
        path, keep = self.folder.path, self.config.save
        found = module.parallel.first(lambda: saving.best_of(path, keep)[:1])
        for best in found:
            step = checkpoint.step_of(best)
            if step != module.step:
                how = Reading("run_dir", keep.verify)
                module.parallel.load(best, module.model, module.trainer.optimizers[0], module.average, how)
            value = checkpoint.read_state(best).metrics[keep.metric]
            self.display.tell(f"weights of step {step}, the best: {keep.metric} {value:.6g}")

    def wait(self) -> None:
        """Finish what is being written."""
        self._saver.wait()

    def _saved(self, path: Path) -> None:
        """A checkpoint is complete."""
        if not self._writes:
            return
        self._tell_left(saving.rotate(self.folder.path, self.config.save))
        state = checkpoint.read_state(path)
        score = state.metrics.get(self.config.save.metric)
        best = score is not None and self.config.save.sign * score <= self.best
        job = Job.here()
        progress = {"progress": job.record} if job is not None and state.step > self._first_step else {}
        self.folder.update(
            data=self.data.facts, data_order_hash=state.data_order_hash, step=state.step,
            goodput=self.watch.goodput(), **progress,
        )
        self.loggers.checkpoint(path, state.step, state.data_order_hash, best)

    def _beside(self, write_state: Callable[[Path], None], generation_file: bytes, path: Path) -> None:
        """The files beside the tensors."""
        write_state(path)
        self.folder.write_config(self.config, path)
        if self._base is not None:
            self._base.write(path)
        if self.data.tokenizer is not None:
            self.data.tokenizer.save(path / "tokenizer")
        if generation_file:
            (path / generation_config.FILE).write_bytes(generation_file)

    def _tell_left(self, left: list[str]) -> None:
        """Say once what could not be removed: the run goes on."""
        for text in left:
            if text not in self._told:
                self._told.add(text)
                self._warn(text)

    def _warn(self, text: str) -> None:
        self.display.tell(text, style="bold")


def _tensors(module: LitModule) -> dict[str, Any]:
    parallel, objective = module.parallel, module.objective
    found = parallel.training_tensors(module.model, module.trainer.optimizers[0], module.average)
    for key in sorted(objective.moved):
        found |= {f"{key}.{name}": tensor for name, tensor in parallel.read_tensors(objective.models[key]).items()}
    return found

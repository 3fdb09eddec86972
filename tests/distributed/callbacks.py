"""What a test does to a run from within, by a text that crosses to the worker."""

import dataclasses
import hashlib
import json
import os
import signal
import warnings
from pathlib import Path

import lightning.pytorch as pl

from tests.distributed.variations import VARIATIONS
from txtrain.checkpoint import save as saving
from txtrain.checkpoint.state import RunState


class Signal(pl.Callback):
    """A signal to one process of the run at a step."""

    def __init__(self, step: int, rank: int, number: int) -> None:
        self.step, self.rank, self.number = step, rank, number

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


class Poison(pl.Callback):
    """A gradient of one process that is not finite, in one step."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank
        self.hooks = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.step == self.step and trainer.global_rank == self.rank:
            norm = module.model.final_norm
            self.hooks = [norm.register_forward_hook(lambda module, given, out: out * float("inf"))]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        while self.hooks:
            self.hooks.pop().remove()


class Hit(pl.Callback):
    """Weights that are worth nothing, in every process, from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.step == self.step:
            module.model.final_norm.weight.data.mul_(30)

    def on_train_end(self, trainer, module):
        (watch,) = (c.watch for c in trainer.callbacks if hasattr(c, "watch"))
        print("LOSSES", json.dumps(dataclasses.asdict(watch.losses.state())), flush=True)


class Warn(pl.Callback):
    """A warning that every process has at each step, and one of its own."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        warnings.warn("what all have", stacklevel=1)
        warnings.warn(f"what {trainer.global_rank} has", stacklevel=1)


class Copy(pl.Callback):
    """What the run has read from its checkpoint, written as another one before a step is made."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer, module):
        tensors = module.parallel.training_tensors(module.model, trainer.optimizers[0], module.average)
        state = RunState(step=module.step)
        saving.save(self.path, tensors, state, lambda folder: None, module.parallel.checkpoint_group)


class Samples(pl.Callback):
    """A line in path-<rank> for each sample that a process trains on: step, global index, and a hash of all that the batch has of it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        with open(f"{self.path}-{trainer.global_rank}", "a") as f:
            for i, index in enumerate(batch["sample_index"].tolist()):
                f.write(f"{module.step + 1} {index} {hash_of({name: value[i] for name, value in batch.items()})}\n")


def hash_of(sample):
    """Pairs are padded to the longest of those that lie beside them: of equal numbers at the end of a row one counts."""
    sha = hashlib.sha256()
    for name in sorted(sample):
        values = sample[name].flatten().tolist()
        while len(values) > 1 and values[-1] == values[-2]:
            values.pop()
        sha.update(f"{name} {values}".encode())
    return sha.hexdigest()


def named(text: str) -> pl.Callback:
    """`SIGTERM 6 1`: that signal before step 7 to process 1; `POISON 6 1`; `HIT 6 *`; `WARN * *`; `COPY path`; `SAMPLES path`; or one of VARIATIONS."""
    if text in VARIATIONS:
        return VARIATIONS[text]()
    what, rest = text.split(" ", 1)
    if what in ("COPY", "SAMPLES"):
        return {"COPY": Copy, "SAMPLES": Samples}[what](rest)
    step, rank = rest.split()
    if what == "HIT":
        return Hit(int(step))
    if what == "WARN":
        return Warn()
    if what == "POISON":
        return Poison(int(step), int(rank))
    return Signal(int(step), int(rank), getattr(signal, what))

"""What a test does to a run from within, by a text that crosses to the worker."""

import os
import signal

import lightning.pytorch as pl


class Signal(pl.Callback):
    """A signal to one process of the run at a step."""

    def __init__(self, step: int, rank: int, number: int) -> None:
        self.step, self.rank, self.number = step, rank, number

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


class Poison(pl.Callback):
    """A weight of one process that is not a number at a step."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.step == self.step and trainer.global_rank == self.rank:
            batch["input_ids"][:] = 0


def named(text: str) -> pl.Callback:
    """`SIGTERM 6 1`: that signal before step 7 to process 1."""
    what, step, rank = text.split()
    return Signal(int(step), int(rank), getattr(signal, what))

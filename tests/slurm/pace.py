"""Steps that take their time, for runs that something is to happen to. `imports=[tests.slurm.pace]` allows it in a configuration."""

import time

import lightning.pytorch as pl


class Pace(pl.Callback):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        time.sleep(self.seconds)

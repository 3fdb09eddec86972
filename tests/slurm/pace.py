"""Steps that take their time, for runs that something is to happen to. `imports=[tests.slurm.pace]` allows it in a configuration."""

import time


def __getattr__(name):
    """`Pace`, made when a run wants it: a plan imports this file too, and does without Lightning."""
    if name != "Pace":
        raise AttributeError(name)
    import lightning.pytorch as pl

    class Pace(pl.Callback):
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            time.sleep(self.seconds)

    return Pace

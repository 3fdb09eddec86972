"""lightning.Trainer as this project uses it: its loop, without its files, bars, checkpoints and remarks."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from txtrain.config.schema import Train
from txtrain.parallel.one_process import OneProcess
from txtrain.training.limits import Limits


def make_trainer(
    config: Train,
    parallel: OneProcess,
    limits: Limits,
    callbacks: Sequence[pl.Callback],
    loggers: Sequence[Any],
    validate_first: bool,
) -> pl.Trainer:
    """A trainer whose every interval counts optimizer updates.

    Args:
        validate_first: an interrupt cut a validation short; Lightning's check before training runs it in full.
    """
    trainer = config.trainer
    return pl.Trainer(
        **parallel.trainer_arguments(),
        max_epochs=-1,
        max_steps=-1 if limits.steps is None else limits.steps,
        val_check_interval=trainer.val_check_interval,
        check_val_every_n_epoch=None,  # else Lightning counts from the start of an epoch
        limit_val_batches=trainer.limit_val_batches,
        num_sanity_val_steps=-1 if validate_first else 0,
        log_every_n_steps=trainer.log_every_n_steps,
        deterministic=trainer.deterministic,
        callbacks=list(callbacks),
        logger=list(loggers) or False,
        enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # the order is the data module's
        inference_mode=False,  # true would compile compiled blocks once more
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's remarks (TXTRAIN_DEBUG=1 shows them), and restore the global switches that it changes."""
    names = ("lightning.pytorch", "lightning.fabric")
    levels = {name: logging.getLogger(name).level for name in names}
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with warnings.catch_warnings():
            if os.environ.get("TXTRAIN_DEBUG") != "1":
                for name in names:
                    logging.getLogger(name).setLevel(logging.ERROR)
                warnings.filterwarnings("ignore", module=r"lightning(\.|_utilities).*")
                warnings.filterwarnings(
                    "ignore", message=r".*(does not have many workers|`_?pytree|isinstance\(treespec)"
                )
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

"""What a logger does at each event of a run: a row, samples, a checkpoint, the end."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from txtrain.objectives.base import Shown


class Sink:
    """A Lightning logger: rows go to log_metrics; samples and checkpoints are not logged.

    All but `__init__` and `patience` is called in the logger's thread (`txtrain.monitor.loggers.line`), in order.
    """

    def __init__(self, logger: Any, x_axis: str = "step") -> None:
        self.logger, self.x_axis, self.has_experiment = logger, x_axis, False
        with contextlib.suppress(Exception):  # `open` meets and reports it
            # Made here, since Lightning asks for it when training starts: two threads at once would make two.
            _ = getattr(logger, "experiment", None)
            self.has_experiment = True

    def open(self, told: Mapping[str, Any]) -> None:
        """told: the configuration; under `run` run.json's contents, under `plan` those of `txtrain plan`."""
        self.logger.log_hyperparams(dict(told))

    def row(self, step: int, metrics: Mapping[str, Any]) -> None:
        """metrics: by column, those that have a value."""
        self.logger.log_metrics(dict(metrics), step=self.x(step, metrics))

    def x(self, step: int, metrics: Mapping[str, Any]) -> int:
        return int(metrics["tokens"]) if self.x_axis == "tokens" else step

    def samples(self, step: int, tokens: int, shown: Sequence[Shown]) -> None:
        """What the objective showed at a validation."""

    def checkpoint(self, path: Path, step: int, order_hash: str, best: bool) -> None:
        """A checkpoint is complete. order_hash: of the samples so far, for text fields; best: by validation loss."""

    def patience(self, status: str) -> float:
        """Seconds that the end of a run waits for the logger. SLURM gives a preempted one half a minute in all."""
        return 10.0 if status == "preempted" else 40.0

    def close(self, status: str) -> None:
        """status: complete, preempted or failed."""
        self.logger.save()
        self.logger.finalize("success" if status == "complete" else "failed")


class TensorBoard(Sink):
    def samples(self, step: int, tokens: int, shown: Sequence[Shown]) -> None:
        import torch

        writer, x = self.logger.experiment, self.x(step, {"tokens": tokens})
        if images := [one.image for one in shown if one.image is not None]:
            writer.add_images("samples/images", torch.stack(images), global_step=x)
        writer.add_text(
            "samples", "\n".join(f"    {one.text}".replace("\n", "\n    ") + "\n" for one in shown), global_step=x
        )

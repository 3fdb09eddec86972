"""When a run ends."""

from __future__ import annotations

import dataclasses as dc
import math

from txtrain.config.schema import Train
from txtrain.config.units import seconds_of


@dc.dataclass(frozen=True)
class Limits:
    """The limit reached first ends the run. steps: optimizer updates; seconds: of training, over all starts."""

    steps: int | None
    seconds: float | None

    @classmethod
    def of(cls, config: Train, n_train: int) -> Limits:
        """From the trainer's max_steps, max_epochs, max_tokens and max_time.

        Args:
            n_train: training samples (sequences of seq_len) in one epoch.
        """
        trainer, batch = config.trainer, int(config.data.global_batch_size)
        if trainer.overfit_batches:
            n_train = min(n_train, trainer.overfit_batches * batch)
        steps = [trainer.max_steps] if trainer.max_steps is not None else []
        if trainer.max_epochs is not None:
            steps.append(math.ceil(trainer.max_epochs * n_train / batch))
        if trainer.max_tokens is not None:
            steps.append(math.ceil(trainer.max_tokens / (batch * config.seq_len)))
        return cls(min(steps, default=None), None if trainer.max_time is None else seconds_of(trainer.max_time))

    def reached(self, step: int, seconds: float) -> bool:
        """Whether the run is over after `step` updates and `seconds` of training."""
        return (self.steps is not None and step >= self.steps) or (self.seconds is not None and seconds >= self.seconds)

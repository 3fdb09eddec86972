"""The learning rate as a function of the step. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable

from txtrain.errors import ConfigError


class Constant:
    """The rate as a share of optimizer.lr: linear warm-up, then 1. Base of the others.

    A pure function of the step: nothing has to be saved, and a resumed run cannot be off by one.
    """

    def __init__(self, total_steps: int | None, warmup_steps: int, min_lr_ratio: float) -> None:
        self.total_steps, self.warmup_steps, self.min_lr_ratio = total_steps, warmup_steps, min_lr_ratio

    def __call__(self, step: int) -> float:
        """The share for update number `step`, counted from 1. The warm-up ends, with 1, at update `warmup_steps`."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        return self.shape(step)

    def shape(self, step: int) -> float:
        return 1.0


class Linear(Constant):
    """After the warm-up, a straight line to min_lr_ratio at the last step."""

    def __init__(self, total_steps: int | None, warmup_steps: int, min_lr_ratio: float) -> None:
        super().__init__(total_steps, warmup_steps, min_lr_ratio)
        self.decay_steps = max(1, known(total_steps, type(self).__name__.lower()) - warmup_steps)

    def shape(self, step: int) -> float:
        progress = min(1.0, (step - self.warmup_steps) / self.decay_steps)
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * self.fall(progress)

    def fall(self, progress: float) -> float:
        """From 1 at progress 0 to 0 at progress 1."""
        return 1.0 - progress


class Cosine(Linear):
    """After the warm-up, half a cosine to min_lr_ratio at the last step (1608.03983, without restarts)."""

    def fall(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))


class InverseSqrt(Constant):
    """1 up to `timescale`, then proportional to 1/sqrt(step), without an end.

    With a warm-up and no timescale it is the Transformer's (1706.03762, equation 3, divided by its peak); with a
    timescale and no warm-up T5's (1910.10683: 10,000). min_lr_ratio is a floor.
    """

    def __init__(self, total_steps: int | None, warmup_steps: int, min_lr_ratio: float, timescale: int | None) -> None:
        super().__init__(total_steps, warmup_steps, min_lr_ratio)
        self.timescale = max(1, warmup_steps) if timescale is None else timescale

    def shape(self, step: int) -> float:
        return max(self.min_lr_ratio, math.sqrt(self.timescale / max(step, self.timescale)))


class WSD(Constant):
    """Warm-up, stable, decay (2404.06395): 1 until the last `decay_steps`, in which it falls to min_lr_ratio.

    Until the decay no rate depends on the length of the run, so several decays can start from one stable run. The decay
    begins after the warm-up at the earliest. `1-sqrt` is from 2405.18392.
    """

    FALLS: dict[str, Callable[[float], float]] = {
        "linear": lambda progress: 1.0 - progress,
        "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
        "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    }

    def __init__(
        self, total_steps: int | None, warmup_steps: int, min_lr_ratio: float, decay_steps: int | None,
        decay_ratio: float, decay_type: str,
    ) -> None:
        super().__init__(total_steps, warmup_steps, min_lr_ratio)
        total = known(total_steps, "wsd")
        wanted = round(decay_ratio * total) if decay_steps is None else decay_steps
        self.start = max(warmup_steps, total - wanted)
        self.decay_steps, self.fall = max(1, total - self.start), self.FALLS[decay_type]

    def shape(self, step: int) -> float:
        progress = min(1.0, max(0, step - self.start) / self.decay_steps)
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * self.fall(progress)


def known(total_steps: int | None, name: str) -> int:
    """The number of steps; ConfigError if it is None."""
    if total_steps is None:
        raise ConfigError(
            "`scheduler` must be constant or inverse_sqrt where only trainer.max_time ends the run, "
            f"but is {name} instead: it needs a number of steps. Add trainer.max_steps."
        )
    return total_steps

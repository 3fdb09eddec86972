"""What the training step asks of a strategy, and how Lightning is told to run it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from txtrain.config import Train
from txtrain.errors import ConfigError


class OneProcess:
    """`strategy=auto` in one process. The methods are the whole of what differs between strategies."""

    gradient_factor = 1.0  # by which a loss is multiplied before backward: data-parallel strategies average gradients, and we want sums

    def device(self, config: Train) -> torch.device:
        """Where this process computes.

        Raises:
            ConfigError: a GPU was asked for and there is none.
        """
        wanted = config.trainer.accelerator
        if wanted == "gpu" and not torch.cuda.is_available():
            raise ConfigError("`trainer.accelerator` must be cpu or auto here, but is gpu instead: torch sees no CUDA device.")
        return torch.device("cpu") if wanted == "cpu" or not torch.cuda.is_available() else torch.device("cuda", 0)

    def trainer_arguments(self, config: Train) -> dict[str, Any]:
        """Arguments of lightning.Trainer."""
        from lightning.fabric.plugins.environments.lightning import LightningEnvironment

        # Named, not detected: under SLURM Lightning would otherwise want one task a device and take the job's signals over.
        accelerator = "cpu" if self.device(config).type == "cpu" else "gpu"
        return {"strategy": "auto", "accelerator": accelerator, "devices": 1, "plugins": [LightningEnvironment()]}

    def reduce(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each value summed over the processes that have different data."""
        return sums

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag

    def micro_batch(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around the forward and backward of one micro-batch; gradients need to be exchanged only with the last."""
        return contextlib.nullcontext()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Clip the gradients to a global norm of at most `max_norm`; the norm before that, 0-dimensional, without waiting for the device."""
        held = [p for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(held, max_norm, norm)
        return norm


def precision_dtype(precision: str) -> torch.dtype:
    """What the matrix products are computed in."""
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32

"""An exponential moving average of the weights, kept beside them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from txtrain.optim.config import EMAConfig


class Average:
    """value <- decay value + (1 - decay) weight, every n-th step; the first time after an update value <- weight.

    With decay null nothing is kept and all methods do nothing. At least float32: one step adds less than the precision
    of bfloat16. Only trained parameters are averaged, no buffers.
    """

    def __init__(self, model: nn.Module, config: EMAConfig) -> None:
        self.model, self.config = model, config
        self._weights = (
            {} if config.decay is None else {name: p for name, p in model.named_parameters() if p.requires_grad}
        )
        self.values = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self._weights.items()
        }
        self.begun = False  # whether the values are of weights after an update, not of the initial ones
        self._trained: list[Tensor] | None = None  # the trained weights, while the averaged ones are in their place

    @torch.no_grad()
    def update(self, step: int, skipped: int = 0, made: bool = True) -> None:
        """After step number `step`. skipped: how many until now made no update; made: whether this one did.

        The first value must not be lost with a step that is skipped.
        """
        if not self.values or step % self.config.every_n_steps or (self.begun and not made):
            return
        assert self.config.decay is not None
        assert self._trained is None
        weight = 1.0 - self.config.decay if self.begun else 1.0
        self.begun = step > skipped
        for name, value in self.values.items():
            value.lerp_(self._weights[name].to(value.dtype), weight)

    @torch.no_grad()
    def restart(self) -> None:
        """Start anew from the current weights."""
        for name, value in self.values.items():
            value.copy_(self._weights[name])

    @torch.no_grad()
    def swap_in(self) -> None:
        """Put the averaged weights into the model."""
        if self._trained is None and self.values:
            self._trained = [p.clone() for p in self._weights.values()]
            for name, p in self._weights.items():
                p.copy_(self.values[name])
            self._forget_gathered()

    @torch.no_grad()
    def swap_out(self) -> None:
        """Put the trained weights back, if they are swapped out."""
        if self._trained is not None:
            for p, trained in zip(self._weights.values(), self._trained, strict=True):
                p.copy_(trained)
            self._trained = None
            self._forget_gathered()

    def _forget_gathered(self) -> None:
        """FSDP2 keeps the root's parameters gathered after a forward without a backward; they would be out of date."""
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: `ema.` and the canonical name."""
        return {f"ema.{name}": value for name, value in self.values.items()}

"""What stands around DeepSpeed's engine: the module that it gets, the calls through it, and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def _with_gradient(block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Have a trained block's input require a gradient, even above frozen layers: when it is computed, DeepSpeed reduces
    the gradients of the block's parameters.
    """
    x, *others = given
    if torch.is_grad_enabled() and not x.requires_grad and any(p.requires_grad for p in block.parameters()):
        x = x.detach().requires_grad_()
    return x, *others


class Whole(nn.Module):
    """The model as DeepSpeed sees it: returns a dict, in which DeepSpeed finds the tensors for its backward hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *given: Any, **named: Any) -> dict[str, Any]:
        return dict(self.model(*given, **named).items())


class Called:
    """The model, called through the engine."""

    def __init__(self, engine: Any, model: nn.Module) -> None:
        self._engine, self.model = engine, model

    def __call__(self, *given: Any, **named: Any) -> Any:
        from txtrain.model.output import ModelOutput

        return ModelOutput(**self._engine(*given, **named))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class Read(Called):
    """A read-only model, called through its engine."""

    @torch.no_grad()
    def __call__(self, *given: Any, **named: Any) -> Any:
        return super().__call__(*given, **named)


class EngineOptimizer:
    """The engine as the optimizer that Lightning steps."""

    def __init__(self, engine: Any, core: Optimizer) -> None:
        self._engine, self.defaults, self.state = engine, core.defaults, core.state
        self.param_groups = core.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = None if closure is None else closure()
        self._engine.step()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._engine.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError("ZeRO's state is read by ZeRO.load")

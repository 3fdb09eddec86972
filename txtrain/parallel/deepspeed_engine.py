"""What stands around DeepSpeed's engine: its configuration, its module, the calls through it, its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from txtrain.parallel.config import BUCKET


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


def by_blocks(model: nn.Module, with_gradient: bool) -> Whole:
    """The module that the engine gets; each block is gathered as a unit, as by FSDP2.

    with_gradient: the blocks' inputs require a gradient (`_with_gradient`).
    """
    import deepspeed

    from txtrain.model.block import Block

    for module in model.modules():
        if isinstance(module, Block):
            deepspeed.utils.set_z3_leaf_module(module, True)
            if with_gradient:
                module.register_forward_pre_hook(_with_gradient)
    return Whole(model)


def gather_around(whole: Whole) -> None:
    """Keep parameters outside the blocks gathered throughout the forward, which reads some directly (tied head)."""
    import deepspeed

    from txtrain.model.block import Block

    within = {p for module in whole.modules() if isinstance(module, Block) for p in module.parameters()}
    for parameter in whole.parameters():
        if parameter not in within:
            for module in (whole, whole.model):
                deepspeed.zero.register_external_parameter(module, parameter)


def engine_config(stage: int, half: bool, cpu_offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET}
    if stage == 3:
        # Small parameters are sharded, too, and torch.nn.functional.linear is not replaced.
        zero |= {"stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
    if cpu_offload:
        place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero |= {"offload_optimizer": place} | ({"offload_param": place} if stage == 3 else {})
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # required but unused: DeepSpeed loads no data here
        "steps_per_print": 1 << 60,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    return (
        made
        | ({"bf16": {"enabled": True}} if half else {})
        | ({"gradient_allreduce_op": "sum"} if stage < 3 else {})
    )


class Called:
    """The model, called through the engine."""

    def __init__(self, engine: Any, model: nn.Module) -> None:
        self._engine, self._model = engine, model

    def __call__(self, *given: Any, **named: Any) -> Any:
        from txtrain.model.output import ModelOutput

        return ModelOutput(**self._engine(*given, **named))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


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

"""Activation checkpointing and compilation of each block's forward. Names of parameters do not change."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from txtrain.ground.native import use_own_compiler_cache
from txtrain.model.block import Block
from txtrain.model.stack import Stack

# Operations whose outputs `selective` keeps: the most expensive to recompute (2205.05198 also weighs their size).
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}
# Also kept, by name: torch registers the first in an import that takes a second; the others are of compiled blocks.
KEPT_BY_NAME = {"torch_attn::_varlen_attn", "flex_attention", "txtrain::grouped_mm"}


def wrap_blocks(model: nn.Module, checkpointing: str | int, compiled: bool) -> None:
    """Compile the forward of every block (all have the same shapes, so one compilation serves every layer), and
    recompute its activations in the backward instead of keeping them (1604.06174).

    checkpointing: none, full, selective, or n for every n-th block.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for module in model.modules():
        if isinstance(module, Stack):
            module.compiled = compiled
    if compiled:
        use_own_compiler_cache()
    if compiled and checkpointing != "none":
        # Of several compiled graphs that fit a call, Dynamo takes the most recently used. Where lengths differ, the
        # recomputation could then save other tensors (https://github.com/pytorch/pytorch/issues/166926).
        # In order of compilation it takes the same graph both times.
        torch._C._dynamo.eval_frame._set_lru_cache(False)  # type: ignore[attr-defined]
    selective = checkpointing == "selective"
    if compiled and selective:
        # What a block records of its experts is of the forward; it would break the graph.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        # A warning at each start of operations in place, which the compiler makes others of.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    for i, block in enumerate(blocks):
        forward = block.forward
        if compiled and not selective:
            forward = torch.compile(forward)
        if checkpointing != "none" and not (isinstance(checkpointing, int) and i % checkpointing):
            forward = functools.partial(_again, forward, selective)
        if compiled and selective:  # the compiler itself keeps products: outside of it nobody sees them
            forward = torch.compile(forward)
        block.forward = forward  # type: ignore[method-assign]


def _again(forward: Callable[..., Any], selective: bool, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    contexts: dict[str, Any] = {"context_fn": _contexts} if selective else {}
    return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)


def _contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The compiler wants torch's own modes. A block whose graph breaks, as where FSDP gathers its experts, is
    checkpointed outside of it."""
    forward, again = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
    return (forward, again) if torch.compiler.is_compiling() else (_OfKept(forward), _OfKept(again))


class _OfKept(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Passes only operations that are kept on to torch's mode, which numbers all operations that it sees and expects
    the same sequence in the recomputation: FSDP skips gathering a block's experts where they are gathered already."""

    def __init__(self, mode: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # as torch's own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _keeps(func):
            return self.mode.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _keeps(op) else CheckpointPolicy.PREFER_RECOMPUTE


def _keeps(op: Any) -> bool:
    return op in KEPT or op.name() in KEPT_BY_NAME

"""What is done to each block's forward: activation checkpointing, and compilation. Names of parameters stay as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from txtrain.model.block import Block

# Outputs that are kept under `selective`: what takes longest to compute again (2205.05198 keeps by cost for size alike).
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def wrap_blocks(model: nn.Module, checkpointing: str | int, compiled: bool) -> None:
    """Change the forward of every block: compile it (all blocks have the same shapes, so that one compilation serves every layer),
    and compute it again in the backward instead of keeping what it computed (1604.06174).

    checkpointing: none, full, selective, or n for every n-th block.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if compiled and checkpointing != "none":
        # Of several compiled graphs that fit a call Dynamo takes the one that was used last; what is computed again would then save other tensors than the
        # first time, where lengths differ (https://github.com/pytorch/pytorch/issues/166926). In the order in which they were made it takes the same one.
        torch._C._dynamo.eval_frame._set_lru_cache(False)  # type: ignore[attr-defined]
    for i, block in enumerate(blocks):
        if compiled:
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
        if checkpointing == "none" or (isinstance(checkpointing, int) and i % checkpointing):
            continue
        block.forward = functools.partial(_again, block.forward, checkpointing == "selective")  # type: ignore[method-assign]


def _again(forward: Callable[..., Any], selective: bool, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    contexts: dict[str, Any] = {"context_fn": _contexts} if selective else {}
    return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)


def _contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    forward, again = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
    return _OfKept(forward), _OfKept(again)


class _OfKept(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows torch's mode those operations alone whose results are kept. It numbers all that it sees, and wants the same numbers again; but
    FSDP's gathering of experts within a block is other operations when they are there already."""

    def __init__(self, mode: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # as torch's own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.mode.__torch_dispatch__(func, types, args, kwargs) if func in KEPT else func(*args, **(kwargs or {}))


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

"""Time of collectives on CPU, whoever calls them: the training step, FSDP2 or DeepSpeed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from txtrain.parallel.timers import Phases

_COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
)


@contextlib.contextmanager
def timed(phases: Phases) -> Iterator[None]:
    """Within this context torch.distributed's collectives count as the phase `communication`.

    For CPU processes alone: on GPUs a call only enqueues the collective on a stream of its own.
    """
    before = {name: getattr(dist, name) for name in _COLLECTIVES if hasattr(dist, name)}
    for name, function in before.items():
        setattr(dist, name, _timed(function, phases))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def _timed(function: Callable[..., Any], phases: Phases) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # part of a graph, which has no time yet
            return function(*args, **kwargs)
        with phases.within("communication"):
            return function(*args, **kwargs)

    return call

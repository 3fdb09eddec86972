"""Modules without storage and without draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

M = TypeVar("M", bound=nn.Module)
_DRAWS = {Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.trunc_normal_, init.kaiming_uniform_}


class _NoDraws(TorchFunctionMode):
    """Of this thread alone."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """The meta device; torch's modules draw nothing when they are built. Values drawn there would be lost, and the
    first draw imports torch's compiler: 1.5 CPU seconds.
    """
    with torch.device("meta"), _NoDraws():
        yield


def with_storage(model: M, device: torch.device | str) -> M:
    """`model.to_empty(device)` for whole tensors, without torch.empty_like: of one on the meta device it imports sympy,
    0.4 CPU seconds."""

    def empty(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)

    return model._apply(empty)

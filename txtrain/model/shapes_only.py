"""Modules without storage and without draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

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

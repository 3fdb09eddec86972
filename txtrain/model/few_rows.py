"""What text is generated with on a CPU: kernels of our own (few_rows.cpp) for few rows.

There the processor waits for weights, which torch's products read at half the rate of memory or less, and torch's RMS
norm is eight small operations. Without autograd, in float32; everything else, and a machine on which the kernels
cannot be compiled, goes by torch.
"""

# R rows, I inputs, O outputs, E experts

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txtrain.ground.native import Unavailable, library
from txtrain.model.ffn.moe import Experts
from txtrain.model.head.heads import LMHead
from txtrain.model.norm.norms import RMSNorm

MOST_ROWS = 64  # with more, torch's product is as fast

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_ARGUMENTS = {
    "product": (*[_POINTER] * 4, *[_LONG] * 3, ctypes.c_int),
    "rms_norm": (*[_POINTER] * 3, *[_LONG] * 2, *[_FLOAT] * 2),
}


class Kernels:
    """Raises Unavailable where they cannot be had."""

    def __init__(self) -> None:
        loaded = library(Path(__file__).with_suffix(".cpp"))
        for name, types in _ARGUMENTS.items():
            getattr(loaded, name).argtypes, getattr(loaded, name).restype = types, None
        self._product: Any = loaded.product
        self._rms_norm: Any = loaded.rms_norm

    def linear(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """`F.linear`."""
        outputs, inputs = weight_OI.shape
        n_rows = x.numel() // inputs
        fits = 0 < n_rows <= MOST_ROWS and x.shape[-1] == inputs and _plain(x, weight_OI, bias_O)
        if not fits:
            return F.linear(x, weight_OI, bias_O)
        out = x.new_empty(*x.shape[:-1], outputs)
        bias = None if bias_O is None else bias_O.data_ptr()
        places = x.data_ptr(), weight_OI.data_ptr(), bias, out.data_ptr()
        self._product(*places, n_rows, outputs, inputs, torch.get_num_threads())
        return out

    def of_layer(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return self.linear(x, layer.weight, layer.bias)

    def of_experts(self, experts: Experts, x_RI: Tensor, name: str, counts_E: Tensor) -> Tensor:
        """`Experts.product`, which reads nothing of experts that no row visits."""
        visits = counts_E.tolist()
        parts = zip(x_RI.split(visits), getattr(experts, name).unbind(0), visits, strict=True)
        return torch.cat([self.linear(part, weight) for part, weight, n in parts if n])

    def normed(self, norm: RMSNorm, x: Tensor) -> Tensor:
        n_rows = x.numel() // len(norm.weight)
        if not (0 < n_rows <= MOST_ROWS and _plain(x, norm.weight)):
            return RMSNorm.forward(norm, x)
        out = torch.empty_like(x)
        places = x.data_ptr(), norm.weight.data_ptr(), out.data_ptr()
        self._rms_norm(*places, n_rows, len(norm.weight), norm.eps, float(norm.unit_offset))
        return out

    def check(self) -> None:
        """Raises Unavailable if they compute something else here than torch."""
        generator = torch.Generator().manual_seed(0)
        norm = RMSNorm(75)
        x, w, norm.weight.data = (torch.randn(*size, generator=generator) for size in ((3, 75), (9, 75), (75,)))
        pairs = (self.linear(x, w), F.linear(x, w)), (self.normed(norm, x), norm(x))
        if not all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in pairs):
            raise Unavailable("what they compute here is wrong")


def _plain(*tensors: Tensor | None) -> bool:
    """In float32, in the order of memory, no part of a sharded one, and nothing else is wanted."""
    for x in tensors:
        if x is None:
            continue
        whole = (type(x) is Tensor or type(x) is nn.Parameter) and x.device.type == "cpu" and x.is_contiguous()
        if not whole or x.dtype is not torch.float32:
            return False
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


@lru_cache
def kernels() -> Kernels | str:
    """This process's, or why it has none. The first call on a machine compiles."""
    try:
        found = Kernels()
        with torch.inference_mode():
            found.check()
    except Unavailable as e:
        return str(e)
    return found


_METHODS: dict[type[nn.Module], tuple[str, Callable[[Kernels, Any], Callable[..., Tensor]]]] = {
    nn.Linear: ("forward", lambda found, layer: partial(found.of_layer, layer)),
    LMHead: ("product", lambda found, head: found.linear),
    Experts: ("product", lambda found, experts: partial(found.of_experts, experts)),
    RMSNorm: ("forward", lambda found, norm: partial(found.normed, norm)),
}


@contextmanager
def few_rows(model: Any) -> Iterator[None]:
    """Within, the kernels serve the model's matrices and norms. Not if its blocks are compiled, or on another device.

    Parts of exactly these classes: what derives from them may compute otherwise.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    found = kernels() if on_cpu and not model.compiled else ""
    changed: list[tuple[nn.Module, str]] = []
    try:
        if isinstance(found, Kernels):
            for module in model.modules():
                name, made = _METHODS.get(type(module), ("", None))
                if made is not None and name not in vars(module):
                    changed.append((module, name))
                    setattr(module, name, made(found, module))
        yield
    finally:
        for module, name in changed:
            delattr(module, name)

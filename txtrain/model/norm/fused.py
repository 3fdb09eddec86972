"""RMS norm as one node of autograd for the CPU, where torch computes it by elementary operations.

It keeps its input and one number a row; what torch's keeps beside them is computed again in the backward. Parts stay in
a core's cache from one operation to the next. Values and gradients are torch's to the last digit, also of a model that
adds the input to what is made of the norm: the gradient of the input has two summands, as torch's has, which autograd
adds to the third one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from txtrain.model.trace.tape import CACHED_ELEMENTS


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """`F.rms_norm` over the last dimension."""
    of_weight = weight is not None and weight.requires_grad
    fits = x.device.type == "cpu" and x.dim() > 1 and (weight is None or weight.dtype == x.dtype)
    wanted = torch.is_grad_enabled() and (x.requires_grad or of_weight)
    if not fits or not wanted or torch.compiler.is_compiling():
        return F.rms_norm(x, shape, weight, eps)
    out: Tensor = _RMSNorm.apply(x, x, weight, torch.finfo(x.dtype).eps if eps is None else eps)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, again: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        out, r = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
        for part, y, r_part in _parts(x, out, r):
            torch.rsqrt(part.pow(2).mean(-1, keepdim=True).add_(eps), out=r_part)
            torch.mul(part, r_part, out=y)
            if weight is not None:
                y.mul_(weight)
        ctx.save_for_backward(x, r, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, r, weight = ctx.saved_tensors
        direct, by_mean = (torch.empty_like(x) if ctx.needs_input_grad[0] else None for _ in range(2))
        product = torch.empty_like(x) if ctx.needs_input_grad[2] else None
        for part, r_part, given, of_part, of_mean, made in _parts(x, r, gradient, direct, by_mean, product):
            if made is not None:
                torch.mul(given, part * r_part, out=made)
            if of_part is not None:
                of_normed = given if weight is None else given * weight
                of_r = (of_normed * part).sum(-1, keepdim=True)
                torch.mul(of_normed, r_part, out=of_part)
                torch.mul(-0.5 * of_r * r_part.pow(3) / x.shape[-1], 2 * part, out=of_mean)
        of_weight = None if product is None else product.sum([*range(x.dim() - 1)])
        return direct, by_mean, of_weight, None


def _parts(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The same rows of each; None stays None."""
    x = tensors[0]
    assert x is not None
    whole = [t if t is None or x.dim() > 2 else t[None] for t in tensors]
    first = x if x.dim() > 2 else x[None]
    size = max(1, CACHED_ELEMENTS * first.shape[1] * len(first) // max(1, x.numel()))
    for b in range(len(first)):
        for start in range(0, first.shape[1], size):
            yield tuple(None if t is None else t[b, start : start + size] for t in whole)

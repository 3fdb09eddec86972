"""Data parallelism with replicas: gradients are summed bucket by bucket during the backward.

torch's DistributedDataParallel rebuilds its buckets after a process' first backward. On three or more ranks that
changes the order of summation, and a resumed run is no longer bitwise equal to the uninterrupted one. Here the buckets
depend on the model alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from txtrain.model.embedding.embeddings import PatchEmbedding, TokenEmbedding
from txtrain.model.position.encodings import Position
from txtrain.model.stack import Stack

BUCKET_BYTES = 25 << 20  # DistributedDataParallel's default


class GradientBuckets:
    """Sums the gradients of parameters over a process group, in buckets from the last parameter to the first.

    Pass the parameters in the order in which the forward reads them (`as_read`): gradients then arrive in bucket order.
    Set `active` before a backward whose gradients are to be summed, and call `finish()` after it. A bucket is reduced
    as soon as its gradients are computed and all buckets before it are sent, so the order is the same on every rank.
    A parameter without a gradient on any rank keeps None.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self.active = False
        self._group = group
        self._buckets = _in_buckets([p for p in parameters if p.requires_grad], bucket_bytes)
        self._waiting: list[int] = []
        self._sent: list[tuple[Any, Tensor]] = []
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                hook: Any = parameter.register_post_accumulate_grad_hook
                hook(lambda _, number=number: self._arrived(number))

    def _arrived(self, number: int) -> None:
        if not self.active:
            return
        if not self._waiting:
            self._waiting = [len(bucket) for bucket in self._buckets]
        self._waiting[number] -= 1
        while len(self._sent) < len(self._buckets) and self._waiting[len(self._sent)] == 0:
            self._send()

    def _send(self) -> None:
        """Reduce the next bucket: its flattened gradients, followed by one flag each for whether it exists."""
        bucket = self._buckets[len(self._sent)]
        parts = [local(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket]
        there = parts[0].new_tensor([p.grad is not None for p in bucket])
        flat = torch.cat([*parts, there])
        self._sent.append((dist.all_reduce(flat, group=self._group, async_op=True), flat))

    def finish(self) -> None:
        """Wait until all gradients are sums over the group."""
        while len(self._sent) < len(self._buckets):
            self._send()
        for bucket, (work, flat) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            sizes = [local(p).numel() for p in bucket]
            *parts, there = torch.split(flat, [*sizes, len(bucket)])
            for i, (parameter, part) in enumerate(zip(bucket, parts, strict=True)):
                if parameter.grad is not None:
                    local(parameter.grad).copy_(part.view_as(local(parameter)))
                elif there[i]:  # another rank has a gradient
                    parameter.grad = torch.zeros_like(parameter)
                    local(parameter.grad).copy_(part.view_as(local(parameter)))
        self._waiting, self._sent, self.active = [], [], False


def as_read(model: nn.Module) -> list[nn.Parameter]:
    """The parameters roughly in the order in which a forward reads them: embeddings, stacks within the model, the rest.

    An embedding's gradient is complete last. Where the model registers it after its blocks, its bucket would hold back
    all others until the end of the backward.
    """
    embedded = _below(model, (TokenEmbedding, PatchEmbedding, Position))
    within = _below(model, (Stack,))
    return sorted(model.parameters(), key=lambda p: 0 if id(p) in embedded else 1 if id(p) in within else 2)


def _below(model: nn.Module, kinds: tuple[type, ...]) -> set[int]:
    return {
        id(p) for module in model.modules() if module is not model and isinstance(module, kinds)
        for p in module.parameters()
    }


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    part = getattr(tensor, "_local_tensor", None)
    return tensor.detach() if part is None else part


def _in_buckets(parameters: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Buckets from the last parameter to the first, of one dtype and device each, closed at `bucket_bytes` or more."""
    buckets: list[list[nn.Parameter]] = []
    size, kind = 0, None
    for parameter in reversed(parameters):
        held = local(parameter)
        if not buckets or size >= bucket_bytes or kind != (held.dtype, held.device):
            buckets.append([])
            size, kind = 0, (held.dtype, held.device)
        buckets[-1].append(parameter)
        size += held.numel() * held.element_size()
    return buckets

"""Copies of a model in every process, their gradients summed while the backward goes on.

torch's DistributedDataParallel rebuilds its buckets after the first backward of a process. On three or more processes that changes the
order of summation, so that a resumed run is no longer bit for bit the uninterrupted one. Here the buckets are a function of the model alone.
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

BUCKET_BYTES = 25 << 20  # as DistributedDataParallel's


class GradientBuckets:
    """Sums the gradients of the parameters over a process group, bucket by bucket, the last parameters first: let them be in the order in
    which a forward reads them (`as_read`), so that their gradients come in the opposite one.

    Set `active` for a backward with which gradients are to be exchanged; `finish()` after it. A bucket is sent as soon as its gradients
    are there and all buckets before it are sent: every process sends them in the same order. A parameter that got no gradient in any
    process keeps None.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup, bucket_bytes: int = BUCKET_BYTES) -> None:
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
        """The next bucket: gradients end to end, and behind them which of them there are."""
        bucket = self._buckets[len(self._sent)]
        parts = [local(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket]
        there = parts[0].new_tensor([p.grad is not None for p in bucket])
        flat = torch.cat([*parts, there])
        self._sent.append((dist.all_reduce(flat, group=self._group, async_op=True), flat))

    def finish(self) -> None:
        """All gradients are sums over the group after this."""
        while len(self._sent) < len(self._buckets):
            self._send()
        for bucket, (work, flat) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            sizes = [local(p).numel() for p in bucket]
            *parts, there = torch.split(flat, [*sizes, len(bucket)])
            for i, (parameter, part) in enumerate(zip(bucket, parts, strict=True)):
                if parameter.grad is not None:
                    local(parameter.grad).copy_(part.view_as(local(parameter)))
                elif there[i]:  # another process had one
                    parameter.grad = torch.zeros_like(parameter)
                    local(parameter.grad).copy_(part.view_as(local(parameter)))
        self._waiting, self._sent, self.active = [], [], False


def as_read(model: nn.Module) -> list[nn.Parameter]:
    """The parameters about as a forward reads them: what embeds tokens and positions, a stack within the model, the rest.

    An embedding's gradient is the last to be whole. Where the model names it behind its blocks, a bucket that it is in would keep all
    the others waiting until the backward has ended.
    """
    embedded = _below(model, (TokenEmbedding, PatchEmbedding, Position))
    within = _below(model, (Stack,))
    return sorted(model.parameters(), key=lambda p: 0 if id(p) in embedded else 1 if id(p) in within else 2)


def _below(model: nn.Module, kinds: tuple[type, ...]) -> set[int]:
    return {id(p) for module in model.modules() if module is not model and isinstance(module, kinds) for p in module.parameters()}


def local(tensor: Tensor) -> Tensor:
    """This process' part of a tensor that lies over several."""
    part = getattr(tensor, "_local_tensor", None)
    return tensor.detach() if part is None else part


def _in_buckets(parameters: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Parameters of one dtype and device, from the last to the first, cut where a bucket is full."""
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

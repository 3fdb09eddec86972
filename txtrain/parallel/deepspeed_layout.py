"""ZeRO's layout of parameters: which elements of each this rank updates, and how the ranks' parts are put together.

ZeRO flattens and concatenates the parameters of a group and cuts at any element. Checkpoints hold tensors of the
parameters' shapes: one parameter at a time is put together and sharded again by rows, as FSDP2 does.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from txtrain.hf.pieces import Held, Piece

_AT_ONCE = 1 << 21  # elements that are read at a time


@dc.dataclass(frozen=True)
class Part:
    """Elements offset .. offset + length of a flattened parameter are start .. start + length of `master`.

    master: this rank's flat float32 tensor. Where length is 0, the rank holds no element of the parameter, and master
    is any of its group, for the names of its state.
    """

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    master: Tensor
    offset: int
    length: int
    start: int

    def of(self, flat: Tensor) -> Tensor:
        """This rank's elements of the parameter, in a tensor laid out as `master`."""
        return flat.detach().narrow(0, self.start, self.length)

    def whole(self, flat: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The whole parameter (or a state of its shape) on every rank of the group; collective."""
        found = torch.zeros(self.shape.numel(), dtype=flat.dtype, device=flat.device)
        found.narrow(0, self.offset, self.length).copy_(self.of(flat))
        # Summed as integers: one rank has the bits, the others 0, so the result is exact, -0.0 included.
        bits = found.view(torch.int32) if found.element_size() == 4 else found
        dist.all_reduce(bits, group=group)
        return found.view(self.shape)

    def fill(self, flat: Tensor, values: Tensor, offset: int = 0) -> None:
        """Set this rank's elements from values of the flattened parameter that begin at its element `offset`."""
        self.of(flat).copy_(
            values.flatten().narrow(0, self.offset - offset, self.length) if self.length else values.flatten()[:0]
        )


def take_flat(piece: Piece, flat: Tensor, first: int, shape: torch.Size) -> None:
    """Read the elements of a piece that lie in `flat`: the part, from element `first` on, of a flattened tensor.

    shape: of the whole tensor.
    """
    width, end = shape[1:].numel(), min(first + len(flat), shape.numel())  # the last parts are padded
    step = max(1, _AT_ONCE // width)
    for row in range(first // width, -(-end // width), step):
        rows = torch.empty(min(step, shape[0] - row), *shape[1:], dtype=flat.dtype, device=flat.device)
        begin, stop = max(first, row * width), min(end, row * width + rows.numel())
        mine, here = flat[begin - first : stop - first], rows.flatten()[begin - row * width : stop - row * width]
        here.copy_(mine)  # keep what other pieces have set
        indices = torch.arange(row, row + len(rows), device="cpu"), *(torch.arange(n, device="cpu") for n in shape[1:])
        Held(rows, indices).take(piece)
        mine.copy_(here)


# DeepSpeed has three optimizers: for stages 1 and 2, for stage 3, and for stage 1 with bfloat16 parameters and float32
# gradient accumulation. Below, the attributes where each keeps its tensors, as of 0.19.8.


def parts(names: dict[nn.Parameter, str], optimizer: Any) -> Iterator[Part]:
    """The part of every parameter of one of these optimizers, in the order of its groups."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        yield from _scattered(names, optimizer)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        yield from _flattened(names, optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups)
    else:
        yield from _flattened(names, optimizer.bf16_groups, optimizer.fp32_groups_flat_partition)


def global_norm(optimizer: Any) -> Tensor:
    """Global norm of the gradients of the next step; infinite if one is not finite. Collective."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        norms = optimizer._get_norm_groups()
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        norms = [optimizer.scaled_global_norm()]
    else:
        from deepspeed.runtime.utils import get_global_norm_of_tensors

        norms = [get_global_norm_of_tensors(optimizer.get_grads_for_norm()[0])]
    norms = torch.stack([torch.as_tensor(norm, dtype=torch.float32) for norm in norms])
    # -1 is DeepSpeed's norm of gradients that are not finite.
    return torch.where((norms < 0).any(), torch.inf, norms.square().sum().sqrt())


def _flattened(names: dict[nn.Parameter, str], groups: list[Any], masters: list[Tensor]) -> Iterator[Part]:
    """Stages 1 and 2: each rank updates one slice of a group's flattened and concatenated parameters."""
    for group, master in zip(groups, masters, strict=True):
        for parameter in group:
            place = parameter._hp_mapping
            if place is None:
                yield Part(names[parameter], parameter, parameter.shape, master, 0, 0, 0)
            else:
                here, there = place.lp_fragment_address, place.hp_fragment_address
                yield Part(names[parameter], parameter, parameter.shape, master, here.start, here.numel, there.start)


def _scattered(names: dict[nn.Parameter, str], optimizer: Any) -> Iterator[Part]:
    """Stage 3: each rank holds an equal slice of every parameter; the last ones are padded."""
    for group in optimizer.fp16_groups:
        for parameter in group:
            number, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            total = parameter.ds_numel
            offset = min(parameter.ds_zero_partition_rank * size, total)
            master = optimizer.fp32_partitioned_groups_flat[number]
            yield Part(
                names[parameter], parameter, parameter.ds_shape, master, offset, min(size, total - offset), start
            )

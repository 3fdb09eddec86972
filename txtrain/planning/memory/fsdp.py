"""FSDP2 by block, in its own order of operations.

A group's parameters are gathered into one buffer and copied out of it; in the backward the next group's buffer is
prefetched while one computes; gradients are copied into one buffer that lives until the next group's is made.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from txtrain.config.schema import Train
from txtrain.model.trace.tape import Bytes, Group, Parameter, Value
from txtrain.parallel.config import Layout
from txtrain.planning.memory.expert_parallel import DividedTape
from txtrain.planning.memory.optimizer import registered
from txtrain.planning.memory.replicated import Block, Copies


class Shards(Copies):
    def __init__(self, config: Train, layout: Layout) -> None:
        super().__init__(config, layout)
        self.stale: Bytes | None = None  # the last gathered buffer of the forward, freed with the next
        self.whole: dict[int, Bytes] = {}
        self.prefetched: dict[int, Bytes] = {}
        self.reduced: Bytes | None = None
        self.made: list[Bytes] = []
        self.again = 0  # the block in its backward or recomputation
        self.reduces_each: bool = config.strategy.reduce_each_micro_batch
        self.earlier_of: dict[int, Bytes] = {}
        self.earlier_shards: Bytes | None = None
        self.order: list[int] = []  # gathered in the forward: number of a block, ~number for a block's experts
        self.places: dict[int, list[int]] = {}  # number -> its indices in `order`
        self.n_gathered = 0  # bytes of the buffers of a micro-batch
        self.backward_of: set[int] = set()  # whose backward has not ended
        self.whole_root = self._gathered(self.root)
        if isinstance(self.t, DividedTape):
            self.t.around = self._around_experts

    # ------------------------------------------------------------------------------------------------------------ sizes

    def own(self, p: Parameter) -> tuple[int, ...]:
        along, shards = self._along(p), self._shards(p)
        return tuple(math.ceil(n / shards) if dim == along else n for dim, n in enumerate(p.shape))

    def _shards(self, p: Parameter) -> int:
        """Ranks that shard it: experts are divided over ranks first, and the remaining ranks shard each."""
        return self.layout.shard // self.ep_size if ".experts." in p.name else self.layout.shard

    def _along(self, p: Parameter) -> int:
        """The sharded dimension: within experts if the shards do not divide their number (`parallel.fsdp.Along`)."""
        if ".experts." not in p.name:
            return 0
        taken = {dim for dim in (1, 2) if p.shape[dim] != self.shapes[p.name][dim]}  # by tensor parallelism
        return next((dim for dim, n in enumerate(p.shape) if n % self._shards(p) == 0 and dim not in taken), 0)

    def _rearranged(self, group: Group) -> Bytes:
        """A further copy after gathering, of parameters not sharded along dimension 0."""
        return self.t.bytes(sum(p.n for p in group.parameters if self._along(p)), kind="gathered")

    def _padded(self, group: Group) -> int:
        """Elements of the whole buffer: each parameter's rows are padded to a multiple of the shards."""
        return sum(map(self._padded_of, group.parameters))

    def _reduced_of(self, group: Group) -> int:
        """The same for parameters with gradients."""
        return sum(self._padded_of(p) for p in group.parameters if p.edge)

    def _padded_of(self, p: Parameter) -> int:
        return math.prod(self.own(p)) * self._shards(p)

    def _of_one(self, group: Group, trained: bool = False) -> int:
        """Elements on this rank. trained: only of parameters with gradients."""
        return sum(math.prod(self.own(p)) for p in group.parameters if p.edge or not trained)

    def _is_alone(self, group: Group) -> bool:
        """Whether no other rank has shards of it, so that nothing is gathered."""
        return bool(group.parameters) and self._shards(group.parameters[0]) == 1

    def _group(self, number: int) -> Group:
        return self.groups[number] if number >= 0 else self.experts[~number]

    def communicated(self) -> dict[str, int]:
        found = Counter(self.t.sent)
        groups = [self.root, *self.groups, *self.experts.values()]
        # Buffers prefetched for blocks without a backward serve the next micro-batch's forward; those of the last one
        # before a reduction are unused.
        unused = self.t.size * sum(self._padded(self._group(number)) for number in self.prefetched)
        times = self.n_micro_batches if self.reduces_each else 1  # that gradients are reduced
        gathered = self.n_micro_batches * (self.n_gathered - unused) + times * unused
        reduced = times * self.stored * sum(self._reduced_of(group) for group in groups if not self._is_alone(group))
        summed = (
            (times * self.gradients if self.layout.replicate > 1 else 0)
            + (self.in_common if self.layout.tensor > 1 else 0)
        )
        for name, n in (("all_gather", gathered), ("reduce_scatter", reduced), ("all_reduce", summed)):
            if n:
                found[name] += n
        return dict(found)

    # --------------------------------------------------------------------------------------------------------- the step

    def before(self) -> None:
        """Gradients of earlier micro-batches are whole on every rank, if they are reduced only in the last one."""
        groups = (self.root, *self.groups, *self.experts.values())
        if self.reduces_each:
            n = 0 if self.offloads else sum(self._of_one(group, trained=True) for group in groups)
            self.earlier_shards = self.t.bytes(n, self.stored, "gradients")
            return
        self.earlier_of = {
            id(g): self.t.bytes(sum(p.n for p in g.parameters if p.edge), self.stored, "gradients") for g in groups
        }
        self.t.accumulates = self.t.size == self.stored  # else they are cast to float32 after the block, and added

    def _buffer(self, group: Group) -> Bytes:
        if self._is_alone(group):
            return self.t.bytes(0)
        self.n_gathered += self._padded(group) * self.t.size
        # with offloading, the copy of the shards on the device
        mine = self.t.bytes(self._of_one(group), self.stored, "gathered") if self.offloads else None
        buffer = self.t.bytes(self._padded(group), kind="gathered")
        del mine
        return buffer

    def _gathered(self, group: Group) -> Bytes:
        buffer = self._buffer(group)
        whole = self.t.bytes(group.n, kind="gathered")
        self._rearranged(group)
        self.stale = buffer
        return whole

    def around(self, block: Block, inputs: Sequence[Value]) -> Value:
        t, number = self.t, self.seen
        self.seen += 1
        self.whole[number] = self._gathered(self.groups[number])
        inputs = [*inputs]
        self._reduces_behind(inputs, number)
        x, *others = inputs
        del inputs
        t.group = Group()
        mine = t.group
        self.groups[number].live = mine
        x = self.computed(number, block, [x, *others])
        t.group = t.root
        self._left_forward(number)
        return t.hook(x, lambda: self._needed(number))

    def _reduces_behind(self, inputs: list[Value], number: int) -> None:
        """Its gradients are reduced once its first input has one; if no input takes one, after everything else."""
        first = next((i for i, x in enumerate(inputs) if x.edge), None)
        if first is not None:
            inputs[first] = self.t.hook(inputs[first], lambda: self._reduced(number))

    def _left_forward(self, number: int) -> None:
        self.places.setdefault(number, []).append(len(self.order))
        self.order.append(number)
        if self.config.strategy.reshard_after_forward:
            del self.whole[number]

    def _around_experts(self, x: Value, compute: Callable[[Value], Value]) -> Value:
        """The experts of a block. In a recomputation they are gathered as for the backward, and stay for it."""
        t, of_block = self.t, self.t.group
        number = ~(self.seen - 1 if t.replayed is None else self.again)
        group = self._group(number)
        if number in self.prefetched:
            self.stale = self.prefetched.pop(number)
            self.whole[number] = t.bytes(group.n, kind="gathered")
            self._rearranged(group)
        elif number not in self.whole:
            self.whole[number] = self._gathered(group)
        entered = [x]
        del x
        self._reduces_behind(entered, number)
        x = entered.pop()
        if t.replayed is None:
            t.group = group.live = Group()
        x = compute(x)
        t.group = of_block
        if t.replayed is None:
            self._left_forward(number)
        else:  # FSDP2 treats them as the root of a forward, which frees its buffer at the end
            self.stale = None
        return t.hook(x, lambda: self._needed(number))

    def after_forward(self) -> None:
        self.stale = None
        self.order.append(len(self.groups))  # the root, which stays
        self._prefetch(len(self.order) - 2)

    def _prefetch(self, place: int) -> None:
        """Prefetch the group at that index of the forward's order."""
        number = self.order[place] if place >= 0 else len(self.groups)
        if number < len(self.groups) and number not in self.whole and number not in self.prefetched:
            self.prefetched[number] = self._buffer(self._group(number))

    def _needed(self, number: int) -> None:
        """Called before a block's backward."""
        if number >= 0:
            self.again = number
        self.backward_of.add(number)
        group = self._group(number)
        if number not in self.whole:
            buffer = self.prefetched.pop(number, None) or self._buffer(group)
            self.whole[number] = self.t.bytes(group.n, kind="gathered")
            self._rearranged(group)
            del buffer
        self._prefetch(self.places[number].pop() - 1)

    def _reduced(self, number: int) -> None:
        """Called after a block's backward."""
        self.backward_of.discard(number)
        self.whole.pop(number, None)
        self._reduce(self._group(number), self._group(number).live)

    def _reduce(self, group: Group, live: Group) -> None:
        self.reduced = None
        if not any(p.edge for p in group.parameters):
            return
        cut = [p.n for p in group.parameters if self._along(p) and p.edge]
        self.t.bytes(max(cut, default=0), kind="reduced")  # they are rearranged one after the other
        before = self.t.bytes(cut[-1] if cut else 0, kind="reduced")  # the last one's original stays referenced
        self.reduced = self.t.bytes(self._reduced_of(group), self.stored, "reduced")
        earlier = self.earlier_of.pop(id(group), None)
        last = self._left(group, live, earlier is not None)
        for p in live.parameters:
            p.gradient = None
        del earlier
        if self.offloads:  # the previous one has been copied to host memory
            self.made.clear()
        made = self.t.bytes(self._of_one(group, trained=True), self.stored, "gradients")
        if self.earlier_shards is None:
            self.made.append(made)  # else it is added to the earlier ones
        if self.device == "cpu" or self._is_alone(group):  # gloo sums a copy; a rank alone divides by 1
            self.t.bytes(self._reduced_of(group), self.stored, "reduced")
        del before, last

    def _left(self, group: Group, live: Group, several: bool) -> Bytes | None:
        """The gradient of a group's last parameter, which FSDP2's loop variable still holds during the reduction.

        several: it is a sum over micro-batches, and part of `earlier_of`.
        """
        i = max(
            (i for i, p in enumerate(group.parameters) if p.edge),
            key=lambda i: (registered(group.parameters[i].name), i)
        )
        if self._along(group.parameters[i]):
            return None  # counted as `before`
        return self.t.bytes(group.parameters[i].n, self.stored, "gradients") if several else live.parameters[i].gradient

    def after_backward(self) -> None:
        del self.whole_root
        self._reduce(self.root, self.t.root)
        # blocks whose inputs take no gradient
        for number in sorted(self.backward_of, key=lambda number: (~number, 1) if number < 0 else (number, 0)):
            self._reduced(number)
        if self.layout.tensor > 1:
            self.t.bytes(self.in_common, 1, "reduced")

"""What one process holds and sends in a step, counted: the model's tape, and what the strategy does around each block."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from txtrain.memory.batch import batch_of, nbytes_of
from txtrain.memory.model import Traced
from txtrain.memory.tape import Bytes, Group, Parameter, Tape, Value
from txtrain.memory.travel import rows_to_experts
from txtrain.parallel.config import Layout

if TYPE_CHECKING:
    from txtrain.config import Train

Block = Callable[..., Value]
FLOAT32 = 4


@dc.dataclass(frozen=True)
class Memory:
    """Of one process, at the fullest moment of a step after the first.

    Attributes:
        peak: bytes; parts: what they are: parameters, optimizer, batch, gradients, activations (kept for the backward), recomputed,
            temporaries, gathered (parameters of others), reduced (gradients on their way).
        held: bytes between steps.
        communicated: bytes of each collective's whole buffer in a step; a ring sends (n - 1) / n of it, an all_reduce twice that.
    """

    micro_batch_size: int
    peak: int
    parts: dict[str, int]
    held: int
    communicated: dict[str, int]


class NotCounted(Exception):
    """A choice whose memory has no closed form here; the text says which and why. communicated: what is counted nevertheless, as in Memory."""

    def __init__(self, why: str, communicated: dict[str, int] | None = None) -> None:
        super().__init__(why)
        self.communicated = communicated or {}


def memory(config: Train, world: int, micro: int | None = None) -> Memory:
    """Counted for micro-batches of `micro` samples (None: as configured) on each of `world` processes.

    Raises:
        NotTraced: an option of the user's own does not say what it computes.
        NotCounted: a strategy or an optimizer has no closed form here.
    """
    _refuse_uncounted(config, world)
    layout = config.strategy.layout(world) if world > 1 else Layout()
    share = max(1, config.data.global_batch_size // layout.data)
    micro = min(micro or config.data.micro_batch_size or share, share)
    strategy = _Sharded(config, layout) if layout.shard > 1 else _Copies(config, layout)
    strategy.n_micro_batches = math.ceil(share / micro)
    strategy.step(micro, several=micro < share)
    static = {**strategy.states(), "batch": nbytes_of(config, share)}
    meter = strategy.t.meter
    at_peak = {kind: n for kind, n in meter.at_peak.items() if n}
    update = static | {"gradients": strategy.gradients}
    held = sum(static.values())
    if held + meter.peak >= sum(update.values()):
        return Memory(micro, held + meter.peak, static | at_peak, held, strategy.communicated())
    return Memory(micro, sum(update.values()), update, held, strategy.communicated())


def _refuse_uncounted(config: Train, world: int) -> None:
    strategy, optimizer = config.strategy, config.optimizer
    if world > 1 and strategy.layout(world).tensor > 1:
        raise NotCounted(f"strategy={strategy.type} cuts matrices, whose pieces are not counted yet")
    if getattr(strategy, "ep_size", 1) > 1:
        why = f"strategy.ep_size={strategy.ep_size}: what experts receive is held beside their shards, and is not counted yet"
        raise NotCounted(why, {"all_to_all": rows_to_experts(config, world)})
    if hasattr(strategy, "stage"):
        raise NotCounted(f"strategy={strategy.type}: what DeepSpeed's engine holds is not counted yet")
    if getattr(strategy, "cpu_offload", False):
        raise NotCounted("strategy.cpu_offload=true: what waits in the processor's memory is not counted yet")
    if not optimizer.elementwise:
        raise NotCounted(f"optimizer={optimizer.type} keeps of each parameter what its shape says, which is not counted yet")


class _Copies:
    """Every process holds all parameters; with several, gradients are copied end to end and summed after the backward."""

    def __init__(self, config: Train, layout: Layout) -> None:
        self.config, self.layout = config, layout
        precision, parts = config.trainer.precision, layout.shard > 1
        self.stored = 2 if precision == "bf16-true" else FLOAT32
        self.t = Tape(2 if precision == "bf16-true" or (precision == "bf16-mixed" and parts) else FLOAT32)
        self.t.autocast = precision == "bf16-mixed" and not parts
        self.seen, self.n_micro_batches = 0, 1

    @property
    def n_params(self) -> int:
        return sum(p.n for p in self.t.parameters)

    @property
    def gradients(self) -> int:
        return self.n_params * self.stored

    def states(self) -> dict[str, int]:
        return {"parameters": self.n_params * self.stored, "optimizer": self.kept(self.n_params)}

    def kept(self, n: int) -> int:
        """What an optimizer that treats all elements alike keeps of n of them."""
        values = self.config.optimizer.state_values("", (n,))
        assert values is not None, self.config.optimizer
        return int(values) * self.stored

    def communicated(self) -> dict[str, int]:
        return {"all_reduce": self.gradients} if self.layout.replicate > 1 else {}

    def step(self, micro: int, several: bool) -> None:
        """Forward and backward of a micro-batch; several: gradients of those before it are there."""
        if several:
            self.before(micro)
        device = "cpu" if self.config.trainer.accelerator == "cpu" else "cuda"
        loss = Traced(self.config.model, batch_of(self.config, micro), self.t, self.around, device).loss()
        self.after_forward()
        self.t.backward(loss)
        self.after_backward()

    def before(self, micro: int) -> None:
        self.earlier = self.t.bytes(self.config.model.n_params, self.stored, "gradients")
        self.t.accumulates = True

    def around(self, block: Block, inputs: Sequence[Value]) -> Value:
        number, self.seen = self.seen, self.seen + 1
        return self.computed(number, block, inputs)

    def computed(self, number: int, block: Block, inputs: Sequence[Value]) -> Value:
        again = self.config.trainer.activation_checkpointing
        if again == "none" or (isinstance(again, int) and number % again):
            return block(self.t, *inputs)
        return self.t.checkpoint(block, inputs, again == "selective")

    def after_forward(self) -> None:
        pass

    def after_backward(self) -> None:
        if self.layout.replicate > 1:
            self.t.bytes(self.gradients, 1, "reduced")


class _Sharded(_Copies):
    """FSDP2 by block, in its own order: a group's parameters are gathered into one buffer and copied out of it; in the backward the
    next group's buffer is there while one computes; gradients are copied into one buffer that lives until the next group's is made."""

    def __init__(self, config: Train, layout: Layout) -> None:
        super().__init__(config, layout)
        survey = Tape()
        self.groups: list[Group] = []
        Traced(config.model, batch_of(config, 1), survey, lambda block, inputs: self._surveyed(survey, block, inputs)).loss()
        self.root = survey.root
        self.stale: Bytes | None = None  # the buffer of the last gathering in the forward, freed with the next
        self.whole: dict[int, Bytes] = {}
        self.prefetched: dict[int, Bytes] = {}
        self.reduced: Bytes | None = None
        self.made: list[Bytes] = []
        self.whole_root = self._gathered(self.root)

    def _surveyed(self, survey: Tape, block: Block, inputs: Sequence[Value]) -> Value:
        survey.group = Group()
        self.groups.append(survey.group)
        made = block(survey, *inputs)
        survey.group = survey.root
        return made

    # ------------------------------------------------------------------------------------------------------------- sizes

    def _padded(self, group: Group) -> int:
        """Elements of the whole buffer: rows of each parameter up to a multiple of the shards."""
        return sum(self._shard(p) for p in group.parameters) * self.layout.shard

    def _cut_within(self, p: Parameter) -> bool:
        """Whether experts are cut within each, as the shards do not divide their number (`sharding.Along`)."""
        return bool(p.rows % self.layout.shard) and any(size % self.layout.shard == 0 for size in p.within)

    def _rearranged(self, group: Group) -> int:
        """Elements that FSDP2 copies once more, in which what each process has lies side by side: after gathering, and before reduction."""
        return sum(p.n for p in group.parameters if self._cut_within(p))

    def _shard(self, p: Parameter) -> int:
        if self._cut_within(p):
            return p.n // self.layout.shard
        return math.ceil(p.rows / self.layout.shard) * (p.n // p.rows)

    def _mine(self) -> int:
        """Elements that the first process keeps."""
        return sum(self._shard(p) for group in (self.root, *self.groups) for p in group.parameters)

    @property
    def gradients(self) -> int:
        return self._mine() * FLOAT32

    def states(self) -> dict[str, int]:
        return {"parameters": self._mine() * self.stored, "optimizer": self.kept(self._mine())}

    def communicated(self) -> dict[str, int]:
        groups = [self.root, *self.groups]
        again = self.groups if self.config.strategy.reshard_after_forward else []
        found = {
            "all_gather": self.n_micro_batches * self.t.size * sum(map(self._padded, [*groups, *again])),
            "reduce_scatter": FLOAT32 * sum(map(self._padded, groups)),
        }
        return found | ({"all_reduce": FLOAT32 * self._mine()} if self.layout.replicate > 1 else {})

    # ------------------------------------------------------------------------------------------------------------ the step

    def before(self, micro: int) -> None:
        """Gradients of earlier micro-batches lie whole in every process: none is reduced before the last."""
        self.earlier_of = {id(g): self.t.bytes(g.n, FLOAT32, "gradients") for g in (self.root, *self.groups)}
        self.t.accumulates = self.t.size == FLOAT32  # else they are made into float32 after the block, and added

    def _buffer(self, group: Group) -> Bytes:
        return self.t.bytes(self._padded(group), kind="gathered")

    def _gathered(self, group: Group) -> Bytes:
        buffer = self._buffer(group)
        whole = self.t.bytes(group.n, kind="gathered")
        self.t.bytes(self._rearranged(group), kind="gathered")
        self.stale = buffer
        return whole

    def around(self, block: Block, inputs: Sequence[Value]) -> Value:
        t, number = self.t, self.seen
        self.seen += 1
        self.whole[number] = self._gathered(self.groups[number])
        x, *others = inputs
        del inputs
        x = t.hook(x, lambda: self._reduced(number))
        t.group = Group()
        mine = t.group
        self.groups[number].live = mine
        x = self.computed(number, block, [x, *others])
        t.group = t.root
        if self.config.strategy.reshard_after_forward:
            del self.whole[number]
        return t.hook(x, lambda: self._needed(number))

    def after_forward(self) -> None:
        self.stale = None
        self._prefetch(len(self.groups) - 1)

    def _prefetch(self, number: int) -> None:
        if number >= 0 and number not in self.whole:
            self.prefetched[number] = self._buffer(self.groups[number])

    def _needed(self, number: int) -> None:
        """Before a block's backward."""
        if number not in self.whole:
            buffer = self.prefetched.pop(number, None) or self._buffer(self.groups[number])
            self.whole[number] = self.t.bytes(self.groups[number].n, kind="gathered")
            self.t.bytes(self._rearranged(self.groups[number]), kind="gathered")
            del buffer
        self._prefetch(number - 1)

    def _reduced(self, number: int) -> None:
        """After a block's backward."""
        del self.whole[number]
        self._reduce(self.groups[number], self.groups[number].live)

    def _reduce(self, group: Group, live: Group) -> None:
        self.reduced = None
        rearranged = self.t.bytes(self._rearranged(group), kind="reduced")
        self.reduced = self.t.bytes(self._padded(group), FLOAT32, "reduced")
        del rearranged
        for p in live.parameters:
            p.gradient = None
        if hasattr(self, "earlier_of"):
            del self.earlier_of[id(group)]
        self.made.append(self.t.bytes(self._padded(group) // self.layout.shard, FLOAT32, "gradients"))

    def after_backward(self) -> None:
        del self.whole_root
        self._reduce(self.root, self.t.root)

"""Every rank holds all parameters, or its part of each matrix; data-parallel ranks sum gradients after the backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from txtrain.config.schema import Train
from txtrain.model.trace.tape import Bytes, Group, Parameter, Tape, Value
from txtrain.optim.config import Held
from txtrain.parallel.config import Layout
from txtrain.planning.memory import optimizer as updates
from txtrain.planning.memory.batch_shapes import batch_of
from txtrain.planning.memory.expert_parallel import DividedTape
from txtrain.planning.memory.forward import Traced, recomputes
from txtrain.planning.memory.tensor_parallel import CutTape, CutTraced

Block = Callable[..., Value]
FLOAT32 = 4


class NotCounted(Exception):
    """A choice whose memory has no closed form here, with the reason. communicated: as in Memory, if counted."""

    def __init__(self, why: str, communicated: dict[str, int] | None = None) -> None:
        super().__init__(why)
        self.communicated = communicated or {}


class Copies:
    """One rank of `layout`. `t` counts memory other than `states()`."""

    def __init__(self, config: Train, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.ep_size: int = config.strategy.ep_size
        precision, shards = config.trainer.precision, layout.shard > 1
        self.stored = 2 if precision == "bf16-true" else FLOAT32
        self.t = self._tape(2 if precision == "bf16-true" or (precision == "bf16-mixed" and shards) else FLOAT32)
        self.t.autocast = precision == "bf16-mixed" and not shards
        self.seen, self.n_micro_batches = 0, 1
        self._survey()

    @property
    def device(self) -> str:
        """Its type: cpu or cuda."""
        return "cpu" if self.config.trainer.accelerator == "cpu" else "cuda"

    @property
    def offloads(self) -> bool:
        """Whether states and gradients are in host memory, while the device has its own."""
        return bool(self.config.strategy.cpu_offload) and self.device != "cpu"

    # -------------------------------------------------------------------------------------------------------- the model

    def _tape(self, size: int = FLOAT32) -> Tape:
        trains = self.config.trains
        if self.layout.tensor > 1:
            made: Tape = CutTape(self.config.model, self.layout.tensor, size, self.device, trains)
        else:
            made = DividedTape(size, self.ep_size, trains) if self.ep_size > 1 else Tape(size, trains)
        return self._with_adapter(made)

    def _with_adapter(self, t: Tape) -> Tape:
        t.rank, t.adapter_dropout = self.config.rank, self.config.adapter.lora_dropout
        return t

    def _loss(self, n: int, t: Tape, around: Callable[[Block, Sequence[Value]], Value]) -> Value:
        traced = CutTraced if isinstance(t, CutTape) else Traced
        return traced(self.config.model, batch_of(self.config, n), t, around, self.device).loss()

    def _survey(self) -> None:
        """Parameters by block, and of experts gathered separately; unsharded shapes; blocks with a backward."""
        self.groups: list[Group] = []
        self.goes_back: list[bool] = []
        self.experts: dict[int, Group] = {}  # by the number of their block
        t = self._tape()

        def apart(x: Value, compute: Callable[[Value], Value]) -> Value:
            of_block, t.group = t.group, Group()
            self.experts[len(self.groups) - 1] = t.group
            made = compute(x)
            t.group = of_block
            return made

        if isinstance(t, DividedTape):
            t.around = apart

        def surveyed(block: Block, inputs: Sequence[Value]) -> Value:
            t.group = Group()
            self.groups.append(t.group)
            made = block(t, *inputs)
            t.group = t.root
            self.goes_back.append(made.edge is not None)
            return made

        self._loss(1, t, surveyed)
        self.root, self.pieces = t.root, t.parameters
        self.shapes = {p.name: p.shape for p in self.pieces}
        if self.layout.tensor > 1 or self.ep_size > 1:
            whole = self._with_adapter(Tape())
            Traced(
                self.config.model, batch_of(self.config, 1), whole, lambda block, inputs: block(whole, *inputs)
            ).loss()
            self.shapes = {p.name: p.shape for p in whole.parameters}

    # ----------------------------------------------------------------------------------------------------------- states

    def own(self, p: Parameter) -> tuple[int, ...]:
        """The shape of the first rank's shard of a parameter."""
        return p.shape

    @property
    def held(self) -> list[Held]:
        """This rank's shard of each parameter."""
        return [self._held(p) for p in self.pieces]

    @property
    def trained(self) -> list[Held]:
        """The same for parameters with gradients."""
        return [self._held(p) for p in self.pieces if p.edge]

    @property
    def n_frozen(self) -> int:
        """Elements of frozen parameters on this rank."""
        return sum(self._held(p).n for p in self.pieces if not p.edge)

    def _held(self, p: Parameter) -> Held:
        return Held(p.name, self.shapes[p.name], self.own(p), p.shape)

    def states(self) -> dict[str, int]:
        """Bytes between steps, without the batch."""
        optimizer = self.config.optimizer.state_bytes({h.name: h.own for h in self.trained}, self.stored)
        assert optimizer is not None, "count.py asks for what an optimizer states"
        parameters = self.stored * sum(h.n for h in self.held)
        averaged = 0 if self.config.ema.decay is None else 4 * sum(h.n for h in self.trained)  # in float32
        return {"parameters": parameters, "optimizer": optimizer, "averaged": averaged}

    def update(self) -> dict[str, int]:
        """Further bytes during the optimizer's step."""
        return {
            "gradients": self.gradients, "temporaries": updates.made(self.config.optimizer, self.trained, self.stored)
        }

    @property
    def gradients(self) -> int:
        """Bytes of the gradients in the optimizer's step."""
        return sum(h.n for h in self.trained) * self.stored

    def communicated(self) -> dict[str, int]:
        found = Counter(self.t.sent)
        if self.layout.replicate > 1:
            found["all_reduce"] += self.gradients
        if self.layout.tensor > 1:
            found["all_reduce"] += self.in_common
        return dict(found)

    def exchanged(self) -> dict[str, int]:
        """Bytes of whole buffers in a step, the update included, by collective."""
        sent = Counter(self.communicated())
        sent.update(self.config.optimizer.update_sent(self.trained, self.stored))
        return dict(sent)

    @property
    def in_common(self) -> int:
        """Bytes of gradients of parameters that every rank holds whole."""
        return sum(self._held(p).n for p in self.pieces if p.edge and p.shape == self.shapes[p.name]) * self.stored

    # --------------------------------------------------------------------------------------------------------- the step

    def step(self, micro: int, several: bool) -> None:
        """Forward and backward of a micro-batch. several: earlier micro-batches have left gradients."""
        if several:
            self.before()
        loss = self._loss(micro, self.t, self.around)
        self.after_forward()
        self.t.backward(loss)
        self.after_backward()
        self.t.sent = Counter({name: n * self.n_micro_batches for name, n in self.t.sent.items()})

    def before(self) -> None:
        self.earlier: Bytes | None = self.t.bytes(sum(p.n for p in self.pieces if p.edge), self.stored, "gradients")
        self.t.accumulates = True

    def around(self, block: Block, inputs: Sequence[Value]) -> Value:
        number, self.seen = self.seen, self.seen + 1
        return self.computed(number, block, inputs)

    def computed(self, number: int, block: Block, inputs: Sequence[Value]) -> Value:
        again = self.config.trainer.activation_checkpointing
        if not recomputes(again, self.config.model, number):
            return block(self.t, *inputs)
        return self.t.checkpoint(block, inputs, again == "selective")

    def after_forward(self) -> None:
        pass

    def after_backward(self) -> None:
        if self.layout.replicate > 1:
            self.t.bytes(self.gradients, 1, "reduced")
        if self.layout.tensor > 1:
            self.t.bytes(self.in_common, 1, "reduced")

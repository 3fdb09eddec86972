"""Memory of tensor parallelism, by the declarations that `txtrain.parallel.tensor_parallel` uses: a component computes
the same with fewer heads or a narrower hidden layer; `txtrain.parallel.tensor_collectives` connects the ranks."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from txtrain.model.config import ModelConfig
from txtrain.model.trace.attention_ops import Drawn, Place
from txtrain.model.trace.tape import Bytes, Gradients, Parameter, Tape, Value, dotted
from txtrain.parallel.divisibility import shared_heads
from txtrain.planning.memory.forward import Traced
from txtrain.registry import WHOLE, cut_of


class Extent(NamedTuple):
    """Sequences, positions of each, and positions on one rank, of which the last may be padding."""

    sequences: int
    length: int
    of_one: int

    def part(self, n: int) -> int:
        """This rank's number of n elements over all positions."""
        return n // self.length * self.of_one


class CutTape(Tape):
    """The tape of one of `parts` ranks that share each layer's matrices."""

    def __init__(self, model: ModelConfig, parts: int, size: int, device: str, trains: Callable[[str], bool]) -> None:
        super().__init__(size, trains)
        self.parts, self.device = parts, device
        tables, parameters = cut_of("embedding", model.embedding), cut_of("head", model.head)
        self.by_vocabulary = {f"{stack}embedding.{table}.weight" for stack in ("", "encoder_") for table in tables}
        self.by_vocabulary |= {f"head.{name}" for name in parameters}
        # the current sublayer: its declaration, its path, and whether its partial sums have been reduced
        self.how, self.sublayer, self.summed = WHOLE, "", False
        self.taken = 0  # key-value heads that every rank holds whole, and of which it reads one
        self.extent = Extent(1, 1, 1)  # of that sublayer

    # --------------------------------------------------------------------------------------------------------- matrices

    def parameter(self, *shape: int, name: str = "weight") -> Parameter:
        if dotted(self.path, name) in self.by_vocabulary:
            shape = (math.ceil(shape[0] / self.parts), *shape[1:])
        return super().parameter(*shape, name=name)

    def linear(
        self, x: Value, inputs: int, outputs: int, bias: bool = False, weight: Value | None = None, name: str = ""
    ) -> Value:
        how = self.how.get(name)
        if how == "shared_rows" and self.taken:
            return self._taken(x, inputs, outputs, bias, name, self.taken)
        if how != "columns" or self.path != self.sublayer:
            return super().linear(x, inputs, outputs, bias, weight, name)
        self.summed = True
        y = self.leave(super().linear(x, inputs, outputs, False, weight, name))
        return self.add(y, self.low(self.parameter(outputs, name=dotted(name, "bias")))) if bias else y

    def _taken(self, x: Value, inputs: int, outputs: int, bias: bool, name: str, heads: int) -> Value:
        y = self._rows_taken(x, inputs, outputs, bias, name, heads)
        if not (r := self.rank(dotted(self.path, name))):
            return y
        return self._adapted(
            y, self.dropout(x, self.adapter_dropout),
            lambda x: self._linear(x, inputs, r, name=dotted(name, "lora_A")),
            lambda x: self._rows_taken(x, r, outputs, False, dotted(name, "lora_B"), heads),
        )

    def _rows_taken(self, x: Value, inputs: int, outputs: int, bias: bool, name: str, heads: int) -> Value:
        weight = self.sliced(
            self.low(self.parameter(heads * outputs, inputs, name=dotted(name, "weight"))), outputs * inputs
        )
        y = self._linear(x, inputs, outputs, False, weight, name)
        return (
            self.add(y, self.sliced(self.low(self.parameter(heads * outputs, name=dotted(name, "bias"))), outputs))
            if bias else y
        )

    def lookup(self, table: Parameter, n: int, columns: int, index: int = 0) -> Value:
        """Each rank looks up the tokens of its part of the vocabulary, others give 0; the vectors are summed."""
        if table.name not in self.by_vocabulary:
            return super().lookup(table, n, columns, index)
        x = super().lookup(table, n, columns, index + 8 * n)
        masked = self.made([x], x.n, x.size, self.bytes(n, 1), lambda g: (Bytes(self.meter, g.n, self.kind),))
        del x
        self.sent["all_reduce"] += masked.nbytes
        return self.made([masked], masked.n, masked.size, None, lambda g: (g,))

    def chunked_loss(
        self, x: Value, weight: Value, shift: Value | None, dim: int, vocabulary: int, capped: bool, smoothed: bool
    ) -> Value:
        sums = 3 if smoothed else 2  # per token and rank: log z, the target's logit, the sum of the logits
        self.sent["all_gather"] += sums * 4 * self.parts * (x.n // dim)
        rows = math.ceil(vocabulary / self.parts)
        return super().chunked_loss(self.spread(x), weight, shift, dim, rows, capped, smoothed)

    def low(self, x: Value) -> Value:
        """A rank's part of a parameter is a view, of which autocast caches no copy."""
        return self.to(x, 2) if self.autocast else x

    # ------------------------------------------------------------------------------------------------------------ lanes

    def mine(self, x: Value) -> Value:
        """A copy of this rank's positions; backward: all_gather."""
        extent, size = self.extent, x.size
        n = extent.part(x.n)
        padded = self._padded(x.n, size, extent)
        made = self.bytes(n, size)
        del padded
        return self.made([x], n, size, None, lambda g: (self._gathered(n, size, extent),), made)

    def join(self, x: Value, n: int) -> Value:
        """All positions, by all_gather; backward: this rank's positions."""
        extent, mine, size = self.extent, x.n, x.size

        def backward(g: Bytes) -> Gradients:
            padded = self._padded(n, size, extent)
            return (g if padded is None and extent.sequences == 1 else self.bytes(mine, size),)

        return self.made([x], n, size, None, backward, self._gathered(mine, size, extent))

    def enter(self, x: Value, n: int) -> Value:
        """All positions, by all_gather; backward: reduce_scatter of partial gradients."""
        extent, size = self.extent, x.size
        return self.made(
            [x], n, size, None, lambda g: (self._reduced(n, size, extent),), self._gathered(x.n, size, extent)
        )

    def leave(self, x: Value) -> Value:
        """This rank's positions of the sum, by reduce_scatter; backward: all_gather."""
        extent, size = self.extent, x.size
        mine = extent.part(x.n)
        return self.made(
            [x], mine, size, None, lambda g: (self._gathered(mine, size, extent),), self._reduced(x.n, size, extent)
        )

    def kept_of(self, x: Value) -> Value:
        """This rank's positions of a value that all ranks have; a view."""
        nbytes = x.nbytes
        return self.made(
            [x], self.extent.part(x.n), x.size, None, lambda g: (Bytes(self.meter, nbytes, self.kind),), x.storage
        )

    def spread(self, x: Value) -> Value:
        """The same value; backward: all_reduce."""
        if x.edge is None:
            return x
        n, size = x.n, x.size

        def backward(g: Bytes) -> Gradients:
            self.sent["all_reduce"] += n * size
            return (self.bytes(n, size),)

        return self.made([x], n, size, None, backward, x.storage)

    def _padded(self, n: int, size: int, extent: Extent) -> Bytes | None:
        """A copy padded with zeros, if the ranks do not divide the positions."""
        whole = extent.part(n) * self.parts
        return self.bytes(whole, size) if whole != n else None

    def _gathered(self, n: int, size: int, extent: Extent) -> Bytes:
        """All ranks' parts of n elements: stacked, then in the order of positions."""
        stacked = self.bytes(n * self.parts, size)
        self.sent["all_gather"] += stacked.n
        if extent.sequences == 1:
            return stacked
        whole = self.bytes(n * self.parts, size)
        del stacked
        return self.bytes(n // extent.of_one * extent.length, size) if extent.length % self.parts else whole

    def _reduced(self, n: int, size: int, extent: Extent) -> Bytes:
        padded, mine = self._padded(n, size, extent), extent.part(n)
        stacked = self.bytes(mine * self.parts, size)
        self.sent["reduce_scatter"] += stacked.n
        made = self.bytes(mine, size)
        if self.device == "cpu":  # gloo sums a copy of what it scatters
            self.bytes(stacked.n, 1)
        del padded, stacked
        return made


class CutTraced(Traced):
    """The forward on one of these ranks: the residual stream is split by positions within blocks, whole outside."""

    t: CutTape

    def _block(self, here: Place, across: Place | None, learned: bool, t: Tape, x: Value, *others: Value) -> Value:
        assert isinstance(t, CutTape)
        t.extent, n = Extent(here.batch, here.queries, math.ceil(here.queries / t.parts)), here.tokens * here.model.dim
        x = t.mine(x) if here.first else x
        x = super()._block(here, across, learned, t, x, *others)
        return t.join(x, n) if here.last else x

    def _computed(self, component: Any, axis: str, t: Tape, x: Value, at: Place) -> Value:
        assert isinstance(t, CutTape)
        n = at.tokens * at.model.dim
        at = dc.replace(at, memory=None if at.memory is None else t.spread(at.memory))
        how = cut_of(axis, component)
        if not how:
            made: Value = component.trace(t, t.enter(x, n), at)
            return t.kept_of(made)
        heads, (model, narrow) = shared_heads(at.model), narrowed(at.model, component, t.parts)
        at = dc.replace(at, model=model, mask=None if at.mask is None else _of_heads(at.mask, at, t.parts))
        t.how, t.sublayer, t.summed, t.taken = how, t.path, False, heads if heads % t.parts else 0
        try:
            made = narrow.trace(t, t.enter(x, n), at)
        finally:  # a recomputation may end within
            t.how = WHOLE
        return made if t.summed else t.leave(made)

    def _bias(self, place: Place) -> Value | None:
        """T5's table is split by heads if attention is."""
        model = place.model
        if cut_of("position", model.position) and cut_of("attention", model.attention):
            place = dc.replace(place, model=dc.replace(model, n_heads=model.n_heads // self.t.parts))
        return super()._bias(place)


def narrowed(model: ModelConfig, component: Any, parts: int) -> tuple[ModelConfig, Any]:
    """A model and its component as one rank computes them."""
    component = component.settled(model)
    for size in component.divided(model):
        owner, name = size.key.split(".")[-2:]
        part = {name: max(1, size.value // parts)}
        if owner == "model":
            model = dc.replace(model, **part)
        else:
            component = dc.replace(component, **part)
    return model, component


def _of_heads(mask: Drawn, at: Place, parts: int) -> Drawn:
    """The bias on the scores for this rank's heads; a view."""
    bias = mask.bias
    if bias is None or bias.n % (at.model.n_heads * at.queries * at.keys):
        return mask
    return dc.replace(mask, bias=Value(bias.n // parts, bias.size, bias.storage, bias.edge))

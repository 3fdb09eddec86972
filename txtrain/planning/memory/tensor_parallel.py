"""Tensor parallelism in bytes, applied from outside and by component type, as `txtrain.parallel.tensor_parallel` cuts modules: a component computes
what it always computes, with fewer heads or a narrower hidden layer; `txtrain.parallel.tensor_collectives` is what passes between the processes."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from txtrain.model.config import ModelConfig
from txtrain.model.trace.attention_ops import Drawn, Place
from txtrain.model.trace.autograd import Meter
from txtrain.model.trace.tape import Bytes, Gradients, Parameter, Tape, Value, dotted
from txtrain.planning.memory.forward import Traced
from txtrain.registry import TABLE

BY_VOCABULARY = {
    "txtrain.model.embedding.embeddings:TokenEmbedding": ("embedding.token.weight", "encoder_embedding.token.weight"),
    "txtrain.model.head.heads:LMHead": ("head.weight", "head.bias"),
    "txtrain.model.head.heads:MLMHead": ("head.weight", "head.bias"),
}


class Narrow(NamedTuple):
    """A component as one process computes it. sums: modules whose output is a part of a sum; None: the whole component's is.

    kv_heads: as many heads' projections of keys and values lie whole in every process, of which it reads one head's.
    """

    model: ModelConfig
    component: Any
    sums: tuple[str, ...] | None
    kv_heads: int | None = None


def _multi_head(model: ModelConfig, attention: Any, layer: int, parts: int) -> Narrow:
    n, kv, h = attention.heads(model)
    here = max(1, kv // parts)
    narrow = dc.replace(attention, n_kv_heads=here, head_dim=h)
    return Narrow(dc.replace(model, n_heads=n // parts), narrow, ("o_proj",), kv if kv % parts else None)


def _latent(model: ModelConfig, attention: Any, layer: int, parts: int) -> Narrow:
    sizes = attention.sizes(model)._asdict()
    return Narrow(dc.replace(model, n_heads=model.n_heads // parts), dc.replace(attention, **sizes), ("o_proj",))


def _feed_forward(model: ModelConfig, ffn: Any, layer: int, parts: int) -> Narrow:
    return Narrow(model, dc.replace(ffn, hidden_dim=ffn.width(model) // parts), ("down_proj",))


def _mixture(model: ModelConfig, ffn: Any, layer: int, parts: int) -> Narrow:
    dense = ffn.dense_width(model) // parts if ffn.dense_layers else None
    narrow = dc.replace(ffn, hidden_dim=ffn.width(model) // parts, dense_hidden_dim=dense)
    return Narrow(model, narrow, ("down_proj",) if layer < ffn.dense_layers else None)


RULES: dict[str, Callable[[ModelConfig, Any, int, int], Narrow]] = {
    "txtrain.model.attention.multi_head:MultiHeadAttention": _multi_head,
    "txtrain.model.attention.latent:LatentAttention": _latent,
    "txtrain.model.ffn.dense:MLP": _feed_forward,
    "txtrain.model.ffn.dense:GatedFFN": _feed_forward,
    "txtrain.model.ffn.moe:feed_forward": _mixture,
}


class Extent(NamedTuple):
    """Sequences, their positions, and how many of these one process has; the last ones may be padding."""

    sequences: int
    length: int
    of_one: int

    def part(self, n: int) -> int:
        """Of n elements of all positions."""
        return n // self.length * self.of_one


class CutTape(Tape):
    """A tape of one of `parts` processes that share each layer's matrices."""

    def __init__(self, model: ModelConfig, parts: int, size: int, device: str) -> None:
        super().__init__(size)
        self.parts, self.device = parts, device
        axes = (("embedding", model.embedding), ("head", model.head))
        self.by_vocabulary = {name for axis, c in axes for name in BY_VOCABULARY.get(_target(axis, c), ())}
        self.sums: tuple[str, ...] = ()  # modules of the sublayer that computes whose output is a part of a sum
        self.kv_heads: int | None = None
        self.extent = Extent(1, 1, 1)  # of that sublayer

    # --------------------------------------------------------------------------------------------------------------- matrices

    def parameter(self, *shape: int, name: str = "weight") -> Parameter:
        if dotted(self.path, name) in self.by_vocabulary:
            shape = (math.ceil(shape[0] / self.parts), *shape[1:])
        return super().parameter(*shape, name=name)

    def linear(self, x: Value, inputs: int, outputs: int, bias: bool = False, weight: Value | None = None, name: str = "") -> Value:
        if self.kv_heads is not None and name in ("k_proj", "v_proj"):
            return self._taken(x, inputs, outputs, bias, name, self.kv_heads)
        if name not in self.sums:
            return super().linear(x, inputs, outputs, bias, weight, name)
        y = self.leave(super().linear(x, inputs, outputs, False, weight, name))
        return self.add(y, self.low(self.parameter(outputs, name=dotted(name, "bias")))) if bias else y

    def _taken(self, x: Value, inputs: int, outputs: int, bias: bool, name: str, heads: int) -> Value:
        weight = self.sliced(self.low(self.parameter(heads * outputs, inputs, name=dotted(name, "weight"))), outputs * inputs)
        y = super().linear(x, inputs, outputs, False, weight, name)
        return self.add(y, self.sliced(self.low(self.parameter(heads * outputs, name=dotted(name, "bias"))), outputs)) if bias else y

    def lookup(self, table: Parameter, n: int, columns: int, index: int = 0) -> Value:
        """Of a vocabulary each process looks up the tokens that it has; the others' vectors are 0, and all are summed."""
        if table.name not in self.by_vocabulary:
            return super().lookup(table, n, columns, index)
        x = super().lookup(table, n, columns, index + 8 * n)
        masked = self.made([x], x.n, x.size, self.bytes(n, 1), lambda g: (Bytes(self.meter, g.n, self.kind),))
        del x
        self._send("all_reduce", masked.nbytes)
        return self.made([masked], masked.n, masked.size, None, lambda g: (g,))

    def chunked_loss(self, x: Value, weight: Value, shift: Value | None, dim: int, vocabulary: int, capped: bool) -> Value:
        self._send("all_gather", 2 * 4 * self.parts * (x.n // dim))  # what each finds of a token: log z, and its target's logit
        return super().chunked_loss(self.spread(x), weight, shift, dim, math.ceil(vocabulary / self.parts), capped)

    def logits(self, x: Value, dim: int, vocabulary: int, weight: Value) -> Value:
        mine = super().logits(self.spread(x), dim, math.ceil(vocabulary / self.parts), weight)
        n = x.n // dim * vocabulary
        stacked = self.bytes(mine.n * self.parts, mine.size)
        self._send("all_gather", stacked.n)
        whole = self.bytes(stacked.n, 1)
        del stacked
        return self.made([mine], n, mine.size, None, lambda g: (g,), whole)

    def low(self, x: Value) -> Value:
        """A process' part of a parameter is a view of it, of which autocast keeps no copy for the next use."""
        return self.to(x, 2) if self.autocast else x

    # ------------------------------------------------------------------------------------------------------------------ lanes

    def mine(self, x: Value) -> Value:
        """Positions of this process, copied; their gradients are gathered."""
        extent, size = self.extent, x.size
        n = extent.part(x.n)
        padded = self._padded(x.n, size, extent)
        made = self.bytes(n, size)
        del padded
        return self.made([x], n, size, None, lambda g: (self._gathered(n, size, extent),), made)

    def join(self, x: Value, n: int) -> Value:
        """All positions of everyone; of their gradient each process has its own."""
        extent, mine, size = self.extent, x.n, x.size

        def backward(g: Bytes) -> Gradients:
            padded = self._padded(n, size, extent)
            return (g if padded is None and extent.sequences == 1 else self.bytes(mine, size),)

        return self.made([x], n, size, None, backward, None if self.stopped else self._gathered(mine, size, extent))

    def enter(self, x: Value, n: int) -> Value:
        """The same; but gradients are parts of a sum."""
        extent, size = self.extent, x.size
        return self.made([x], n, size, None, lambda g: (self._reduced(n, size, extent),), self._gathered(x.n, size, extent))

    def leave(self, x: Value) -> Value:
        """Parts are summed, and each process keeps its positions."""
        extent, size = self.extent, x.size
        mine = extent.part(x.n)
        storage = None if self.stopped else self._reduced(x.n, size, extent)
        return self.made([x], mine, size, None, lambda g: (self._gathered(mine, size, extent),), storage)

    def kept_of(self, x: Value) -> Value:
        """Positions of this process of what all have computed alike; a view."""
        nbytes = x.nbytes
        return self.made([x], self.extent.part(x.n), x.size, None, lambda g: (Bytes(self.meter, nbytes, self.kind),), x.storage)

    def spread(self, x: Value) -> Value:
        """The same value, whose gradients are summed."""
        if x.edge is None:
            return x
        n, size = x.n, x.size

        def backward(g: Bytes) -> Gradients:
            self._send("all_reduce", n * size)
            return (self.bytes(n, size),)

        return self.made([x], n, size, None, backward, x.storage)

    def saves_of(self, block: Callable[..., Value], values: Sequence[Value], own: Sequence[Parameter], products: list[Bytes] | None) -> int | None:
        """Tried with a meter of its own: torch stops once all that was kept is there again, and sends nothing after that."""
        meter, sent, first = self.meter, dict(self.sent), self.n_saved
        self.meter, self.replayed, self.products = Meter(), iter(own), None if products is None else [Bytes(Meter(), 0, "") for _ in products]
        block(self, *values)
        n = self.n_saved
        self.meter, self.sent, self.n_saved, self.replayed, self.products = meter, sent, first, None, None
        return n

    def _padded(self, n: int, size: int, extent: Extent) -> Bytes | None:
        """A copy with zeros behind, where the processes do not divide the positions."""
        whole = extent.part(n) * self.parts
        return self.bytes(whole, size) if whole != n else None

    def _gathered(self, n: int, size: int, extent: Extent) -> Bytes:
        """Of parts of n elements; side by side, then position by position."""
        stacked = self.bytes(n * self.parts, size)
        self._send("all_gather", stacked.n)
        if extent.sequences == 1:
            return stacked
        whole = self.bytes(n * self.parts, size)
        del stacked
        return self.bytes(n // extent.of_one * extent.length, size) if extent.length % self.parts else whole

    def _reduced(self, n: int, size: int, extent: Extent) -> Bytes:
        padded, mine = self._padded(n, size, extent), extent.part(n)
        stacked = self.bytes(mine * self.parts, size)
        self._send("reduce_scatter", stacked.n)
        made = self.bytes(mine, size)
        if self.device == "cpu":  # gloo sums a copy of what it scatters
            self.bytes(stacked.n, 1)
        del padded, stacked
        return made

    def _send(self, name: str, nbytes: int) -> None:
        self.sent[name] = self.sent.get(name, 0) + nbytes


class CutTraced(Traced):
    """The model's forward as one of these processes computes it: the stream by positions within the blocks, whole outside."""

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
        rule = RULES.get(_target(axis, component))
        if rule is None:
            made: Value = component.trace(t, t.enter(x, n), at)
            return t.kept_of(made)
        narrow = rule(at.model, component, at.layer, t.parts)
        at = dc.replace(at, model=narrow.model, mask=None if at.mask is None else _of_heads(at.mask, at, t.parts))
        with _computing(t, narrow):
            made = narrow.component.trace(t, t.enter(x, n), at)
        return t.leave(made) if narrow.sums is None else made

    def _bias(self, place: Place) -> Value | None:
        """T5's table lies by heads where attention is cut by heads."""
        model = place.model
        if _target("position", model.position) == "txtrain.model.position.encodings:RelativeBias" and _target("attention", model.attention) in RULES:
            place = dc.replace(place, model=dc.replace(model, n_heads=model.n_heads // self.t.parts))
        return super()._bias(place)


@contextmanager
def _computing(t: CutTape, narrow: Narrow) -> Iterator[None]:
    before = t.sums, t.kv_heads
    t.sums, t.kv_heads = narrow.sums or (), narrow.kv_heads
    try:
        yield
    finally:
        t.sums, t.kv_heads = before


def _of_heads(mask: Drawn, at: Place, parts: int) -> Drawn:
    """What is added to the scores, of this process' heads; a view."""
    bias = mask.bias
    if bias is None or bias.n % (at.model.n_heads * at.queries * at.keys):
        return mask
    return dc.replace(mask, bias=Value(bias.n // parts, bias.size, bias.storage, bias.edge))


def _target(axis: str, component: Any) -> str:
    target = TABLE[axis][component.type].target
    return target if isinstance(target, str) else ""

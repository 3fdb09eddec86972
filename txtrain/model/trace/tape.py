"""The operations of a trace: the bytes that each allocates, saves for its gradient, and allocates in the backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from txtrain.model.trace.autograd import Bytes, Gradients, Group, Node, Parameter, Recorder, Value, dotted

CHUNK_ELEMENTS = 1 << 22  # logits that the chunked loss holds at a time
CHUNK_ROWS = 128  # or more than those, for so many tokens: each chunk reads and writes the gradient of all weights
CACHED_ELEMENTS = 1 << 17  # of them, so many stay in a core's cache from one operation to the next

__all__ = [
    "CACHED_ELEMENTS", "CHUNK_ELEMENTS", "CHUNK_ROWS", "Bytes", "Gradients", "Group", "Parameter", "Tape", "Value",
    "dotted",
]


class Tape(Recorder):
    """A recorder with torch's operations, as its CPU kernels compute them."""

    def linear(
        self, x: Value, inputs: int, outputs: int, bias: bool = False, weight: Value | None = None, name: str = ""
    ) -> Value:
        """x times a matrix [outputs, inputs], with what its adapter adds. name: of its module in the current one."""
        y = self._linear(x, inputs, outputs, bias, weight, name)
        if not (r := self.rank(dotted(self.path, name)) if weight is None else 0):
            return y
        return self._adapted(
            y, self.dropout(x, self.adapter_dropout),
            lambda x: self._linear(x, inputs, r, name=dotted(name, "lora_A")),
            lambda x: self._linear(x, r, outputs, name=dotted(name, "lora_B")),
        )

    def _adapted(self, y: Value, x: Value, A: Callable[[Value], Value], B: Callable[[Value], Value]) -> Value:
        """`model.lora`: y + B(A(x) * scaling)."""
        before = self.forward_flops
        h = [A(x)]
        del x
        h.append(self.scaled(h.pop()))
        h.append(B(h.pop()))
        self.adapter_flops += self.forward_flops - before
        return self.add(y, h.pop())

    def _linear(
        self, x: Value, inputs: int, outputs: int, bias: bool = False, weight: Value | None = None, name: str = ""
    ) -> Value:
        own = self.parameter(outputs, inputs, name=dotted(name, "weight")) if weight is None else weight
        shift = [self.low(self.parameter(outputs, name=dotted(name, "bias")))] if bias else []
        x, weight = self.low(x), self.low(own)
        wants, learns, shifts = x.edge is not None, weight.edge is not None, [y.edge is not None for y in shift]

        def backward(g: Bytes) -> Gradients:
            of_bias = [self.bytes(outputs, x_size) if learned else None for learned in shifts]
            of_weight = self.bytes(inputs * outputs, x_size) if learns else None
            return (self.bytes(x_bytes, 1) if wants else None, of_weight, *of_bias)

        x_size, x_bytes = x.size, x.n * x.size
        n = x.n // inputs * outputs
        self.multiplied(2.0 * x.n * outputs, x, weight)
        # The weight's storage matters if it is a copy of the parameter.
        saved = (x.storage if learns else None, (weight.storage, wants) if wants else None)
        return self.made([x, weight, *shift], n, x.size, saved, backward, self.product(n, x.size))

    def pointwise(self, x: Value, keeps: str = "input", temporaries: int = 0) -> Value:
        """A function of each element. keeps: input, result or nothing, for the gradient."""
        out = self.like(x)
        nbytes = x.nbytes

        def backward(g: Bytes) -> Gradients:
            held = [self.bytes(nbytes, 1) for _ in range(temporaries)]
            made = self.bytes(nbytes, 1)
            del held
            return (made,)

        saved = {"input": x.storage, "result": out, "nothing": None}[keeps]
        return self.made([x], x.n, x.size, saved, backward, out)

    def activation(self, x: Value, name: str) -> Value:
        if name == "relu2":
            return self.square(self.pointwise(x, "result"))
        return self.pointwise(x, "result" if name in ("relu", "tanh") else "input")

    def glu(self, gate: Value, up: Value, activation: str) -> Value:
        """`ffn.gated`: its parts exist one at a time."""
        if gate.edge is None or up.edge is None or activation not in ("silu", "gelu", "gelu_tanh"):
            return self.mul(self.activation(gate, activation), up)
        out, nbytes, size, part = self.like(gate), gate.nbytes, gate.size, min(gate.n, CACHED_ELEMENTS)
        self.bytes(part, size)

        def backward(g: Bytes) -> Gradients:
            both = self.bytes(nbytes, 1), self.bytes(nbytes, 1)
            self.bytes(part, size)
            return both

        return self.made([gate, up], gate.n, size, (gate.storage, up.storage), backward, out)

    def square(self, x: Value) -> Value:
        return self.pointwise(x, "input", temporaries=2)

    def scaled(self, x: Value) -> Value:
        return self.pointwise(x, "nothing")

    def mul(self, a: Value, b: Value) -> Value:
        """Elementwise product; the smaller one is broadcast."""
        n, size = max(a.n, b.n), max(a.size, b.size)
        saved = (b.storage if a.edge else None, a.storage if b.edge else None)
        wants, sizes = _operands(a, b)

        def backward(g: Bytes) -> Gradients:
            wide = [self.bytes(n, size) if wanted else None for wanted in wants]
            return tuple(self._summed(w, small, size) for w, small in zip(wide, sizes, strict=True))

        return self.made([a, b], n, size, saved, backward)

    def _summed(self, gradient: Bytes | None, n: int, size: int) -> Bytes | None:
        return self.bytes(n, size) if n and gradient is not None else gradient

    def add(self, a: Value, b: Value, minus: bool = False) -> Value:
        n, size, own_sizes = max(a.n, b.n), max(a.size, b.size), (a.size, b.size)
        wants, sizes = _operands(a, b)

        def backward(g: Bytes) -> Gradients:
            second = self.bytes(n, size) if minus and wants[1] else g
            given = zip((g, second), wants, sizes, strict=True)
            both = [self._summed(x if wanted else None, small, size) for x, wanted, small in given]
            return tuple(
                x if x is None or own == size else self.bytes(n, own) for x, own in zip(both, own_sizes, strict=True)
            )

        return self.made([a, b], n, size, None, backward)

    def mean(self, x: Value, n: int) -> Value:
        """n means."""
        return self.unary(x, n)

    def softmax(self, x: Value) -> Value:
        return self.pointwise(x, "result")

    def dropout(self, x: Value, p: float) -> Value:
        """With a mask of the values' own dtype, as on the CPU."""
        return self.mul(x, self.constant(x.n, x.size)) if p else x

    def copy(self, x: Value) -> Value:
        """A copy in another memory layout, whose gradient is a view."""
        return self.made([x], x.n, x.size, None, lambda g: (g,))

    def back_copied(self, x: Value) -> Value:
        """The value itself, whose gradient is copied into another memory layout."""
        return x if x.edge is None else self.unary(x, x.n, storage=x.storage)

    def to(self, x: Value, size: int) -> Value:
        """A cast to elements of that many bytes."""
        return x if x.size == size else self.unary(x, x.n, size)

    def split(self, x: Value, *parts: int) -> list[Value]:
        """Views of so many elements each, whose gradients are concatenated."""
        nbytes, size = x.nbytes, x.size
        if x.edge is None:
            return [Value(n, size, x.storage) for n in parts]
        node = Node(next(self.numbers), (x.edge,), None, lambda *g: (self.bytes(nbytes, 1),))
        return [Value(n, size, x.storage, (node, i)) for i, n in enumerate(parts)]

    def cat(self, *parts: Value) -> Value:
        k = len(parts)
        return self.made(parts, sum(p.n for p in parts), parts[0].size, None, lambda g: (g,) * k)

    def expanded(self, x: Value, n: int) -> Value:
        """A view that repeats x, whose gradient is summed."""
        return self.unary(x, n, storage=x.storage)

    def repeated(self, x: Value, times: int) -> Value:
        """A copy that repeats each head so many times."""
        return self.unary(x, x.n * times)

    def layer_norm(self, x: Value, size: int, bias: bool) -> Value:
        weights = [self.parameter(size, name=name) for name in (("weight", "bias") if bias else ("weight",))]
        statistics = self.bytes(2 * x.n // size, 4)
        nbytes, wide, wants, learned = x.nbytes, x.size, x.edge is not None, [w.edge is not None for w in weights]

        def backward(g: Bytes) -> Gradients:
            of_x = self.bytes(nbytes, 1) if wants else None
            return (of_x, *(self.bytes(size, wide) if learns else None for learns in learned))

        return self.made([x, *weights], x.n, x.size, (x.storage, statistics), backward)

    def rms_norm(self, x: Value, size: int, unit_offset: bool) -> Value:
        """As `norm.fused`, on the CPU; half precision is computed in float32."""
        weight: Value = self.parameter(size)
        wide = self.to(x, 4)
        if unit_offset:
            weight = self.made([weight], size, weight.size, None, lambda g: (g,))
        if x.size == 4:
            return self._rms_norm(wide, size, weight)
        y = self._rms_norm(wide, size)
        return self.to(self.mul(y, self.to(weight, 4)), x.size) if unit_offset else self.mul(self.to(y, x.size), weight)

    def _rms_norm(self, x: Value, size: int, weight: Value | None = None) -> Value:
        out, r, part = self.like(x), self.bytes(x.n // size, 4), min(x.n, CACHED_ELEMENTS)
        weights = [] if weight is None else [weight]
        nbytes, wants, learned = x.nbytes, x.edge is not None, [w.edge is not None for w in weights]
        self.bytes(part, 4)

        def backward(g: Bytes) -> Gradients:
            of_x = [self.bytes(nbytes, 1) if wants else None for _ in range(2)]  # as two summands
            product = self.bytes(nbytes, 1) if any(learned) else None
            temporaries = [self.bytes(part, 4) for _ in range(2)]
            del temporaries
            of_weight = [self.bytes(size, 4) if learns else None for learns in learned]
            del product
            return (*of_x, *of_weight)

        held = (x.storage, r, *(w.storage for w in weights))
        return self.made([x, x, *weights], x.n, x.size, held, backward, out)

    def matmul(self, a: Value, b: Value, n: int) -> Value:
        """A product of n elements; each operand is saved for the other's gradient."""

        def backward(g: Bytes) -> Gradients:
            return tuple(self.bytes(nbytes, 1) if nbytes else None for nbytes in sizes)

        sizes = [x.nbytes if x.edge else 0 for x in (a, b)]
        saved = (a.storage if b.edge else None, b.storage if a.edge else None)
        return self.made([a, b], n, a.size, saved, backward, self.product(n, a.size))

    def lookup(self, table: Parameter, n: int, columns: int, index: int = 0) -> Value:
        """n rows of a table. index: bytes of an index that is allocated for them."""
        return self.picked(table, n * columns, index)

    def picked(self, x: Value, n: int, index: int) -> Value:
        """n elements of x, by an index of so many bytes, which is saved."""
        return self.unary(x, n, saved=self.bytes(index, 1) if index else None)

    def sliced(self, x: Value, n: int, copies: bool = False) -> Value:
        """n elements of x, as a view. copies: what reads them needs them contiguous."""
        view = self.unary(x, n, storage=x.storage)
        return self.copy(view) if copies else view

    def added_up(self, x: Value, n: int, order: Value) -> Value:
        """Rows of x added into n zeros; torch saves the rows, although it needs only their shape."""
        zeros = self.bytes(n, x.size)
        made = self.unary(x, n, saved=(order.storage, x.storage))
        del zeros
        return made

    def unary(
        self, x: Value, n: int, size: int | None = None, saved: Any = None, storage: Bytes | None = None
    ) -> Value:
        """n elements computed from x, whose gradient is new."""
        nbytes = x.nbytes
        return self.made([x], n, size or x.size, saved, lambda g: (self.bytes(nbytes, 1),), storage)

    def grouped(self, x: Value, inputs: int, outputs: int, experts: int, name: str = "weight") -> Value:
        """Rows of x, each times its expert's matrix, with what its adapter adds."""
        y = self._grouped(x, inputs, outputs, experts, name)
        if not (r := self.rank(dotted(self.path, name))):
            return y
        return self._adapted(
            y, x,
            lambda x: self._grouped(x, inputs, r, experts, f"{name}_lora_A"),
            lambda x: self._grouped(x, r, outputs, experts, f"{name}_lora_B"),
        )

    def _grouped(self, x: Value, inputs: int, outputs: int, experts: int, name: str) -> Value:
        both = x, self.parameter(experts, outputs, inputs, name=name)
        x, weight = (self.to(y, 2) for y in both) if self.autocast else both  # autocast does not cache these casts
        nbytes, whole, n = x.nbytes, weight.n * x.size, x.n // inputs * outputs
        aligned = all(length * x.size % 16 == 0 for length in (inputs, outputs))  # else the kernel loops over experts
        product = self.product(n, x.size)
        wants, learns = x.edge is not None, weight.edge is not None
        self.multiplied(2.0 * x.n * outputs, x, weight)

        def backward(g: Bytes) -> Gradients:
            rows = None if aligned or not wants else self.bytes(nbytes, 1)
            matrices = None if aligned or not learns else self.bytes(whole, 1)
            of_weight = self.bytes(whole, 1) if learns else None
            del matrices
            of_x = self.bytes(nbytes, 1) if wants else None
            del rows
            return of_x, of_weight

        saved = (x.storage if learns else None, (weight.storage, wants) if wants else None)
        made = self.made([x, weight], n, x.size, saved, backward, product if aligned else None)
        del product
        return made

    def experts(self, x: Value, dim: int, compute: Callable[[Value], Value]) -> Value:
        """The experts' output for their rows."""
        return compute(x)

    def chunked_loss(
        self, x: Value, weight: Value, shift: Value | None, dim: int, vocabulary: int, capped: bool, smoothed: bool
    ) -> Value:
        """`head.loss.ChunkedCrossEntropy`, whose forward computes the gradients by chunks of tokens."""
        n, rows = x.n // dim, max(CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary)
        x = self.low(x)
        if self.autocast:  # the loss casts by itself: no cached copies
            weight, shift = self.to(weight, 2), None if shift is None else self.to(shift, 2)
        inputs = [x, weight, *([shift] if shift else [])]
        self.multiplied(2.0 * x.n * vocabulary, x, weight)
        sizes = zip(inputs, (x.n, weight.n, vocabulary), (x.size, 4, 4), strict=False)
        gradients = [self.bytes(count, size) if y.edge else None for y, count, size in sizes]
        wanted = any(gradients)
        chunk = min(rows, n) * vocabulary
        logits = self.bytes(chunk, x.size)
        if x.size != 4:
            logits = self.bytes(chunk, 4)  # they become their gradient in place
        cached = min(chunk, max(1, CACHED_ELEMENTS // vocabulary) * vocabulary)
        temporaries = [self.bytes(cached, 4) for _ in range(2 if capped and wanted else 1)]
        del temporaries
        low = self.bytes(chunk, x.size) if wanted and x.size != 4 else None
        self.bytes(chunk // vocabulary * dim if gradients[0] else 0, x.size)
        if gradients[1] and x.size != 4:
            self.bytes(min(weight.n, max(1, CHUNK_ELEMENTS // dim) * dim), x.size)
        del logits, low
        if x.size != 4:  # the sums are cast at the end
            gradients[1:] = [None if g is None else self.bytes(g.n // 4, x.size) for g in gradients[1:]]

        def backward(g: Bytes) -> Gradients:  # scaled where they lie
            made = tuple(gradients)
            gradients.clear()
            return made

        return self.made(inputs, 1, 4, gradients, backward)

    def kept(self, name: str, make: Callable[[], Parameter]) -> Parameter:
        """A parameter that several parts of the model share. name: any, within the current module."""
        key = dotted(self.path, name)
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def exactly(self) -> contextlib.AbstractContextManager[None]:
        """Without autocast."""
        return self.having(autocast=False)

    def low(self, x: Value) -> Value:
        """As autocast casts: to 2 bytes, a parameter once for all its uses."""
        if not self.autocast or x.size == 2:
            return x
        if not isinstance(x, Parameter) or x.edge is None:  # autocast keeps copies of what takes a gradient
            return self.to(x, 2)
        if id(x) not in self.casts:
            self.casts[id(x)] = self.to(x, 2)
        return self.casts[id(x)]


def _operands(a: Value, b: Value) -> tuple[tuple[bool, bool], tuple[int, int]]:
    """Which operands want a gradient, and the elements of those that are broadcast, else 0."""
    return (a.edge is not None, b.edge is not None), (a.n if a.n < b.n else 0, b.n if b.n < a.n else 0)

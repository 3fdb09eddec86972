"""A forward and its backward in bytes: what autograd keeps, makes and gives back, in the order in which it does. No torch.

Each component's config says what its module computes (`trace`, beside `flops`) in the operations below. An operation takes the
bytes of its result, keeps what its gradient needs, and knows what its gradient makes. The bytes of a value are given back when
nobody holds it any more: by Python's own count of references, as in torch. Nothing is computed, and no number is rounded.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

class NotTraced(Exception):
    """An option of the user's own does not say what it computes."""


CHUNK_ELEMENTS = 1 << 22  # logits that the loss holds at a time, where the caller does not want them
Gradients = tuple["Bytes | None", ...]


class Meter:
    """Bytes held, by kind, and what they were at the fullest moment."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.by_kind: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}
        self.largest = 0  # of the storages that lived for one moment

    def take(self, n: int, kind: str) -> None:
        self.now += n
        self.by_kind[kind] = self.by_kind.get(kind, 0) + n
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self.by_kind)

    def give(self, n: int, kind: str) -> None:
        self.now -= n
        self.by_kind[kind] -= n


class Bytes:
    """A storage: taken when made, given back when nobody refers to it."""

    __slots__ = ("kind", "meter", "n")

    def __init__(self, meter: Meter, n: int, kind: str) -> None:
        self.meter, self.n, self.kind = meter, n, kind
        meter.take(n, kind)

    def __del__(self) -> None:
        self.meter.give(self.n, self.kind)

    def becomes(self, kind: str) -> Bytes:
        self.meter.by_kind[self.kind] -= self.n
        self.meter.by_kind[kind] = self.meter.by_kind.get(kind, 0) + self.n
        self.kind = kind
        return self


class Node:
    """What makes a value's gradient into those of its inputs. `saved` is given back once that is done."""

    __slots__ = ("backward", "edges", "number", "saved")

    def __init__(self, number: int, edges: Sequence[tuple[Node, int] | None], saved: Any, backward: Callable[..., Gradients]) -> None:
        self.number, self.edges, self.saved, self.backward = number, edges, saved, backward


class Value:
    """n elements of `size` bytes each in some storage; `edge`: the node that made it and which of its results it is, None without a gradient."""

    __slots__ = ("edge", "n", "size", "storage")

    def __init__(self, n: int, size: int, storage: Bytes | None, edge: tuple[Node, int] | None = None) -> None:
        self.n, self.size, self.storage, self.edge = n, size, storage, edge

    @property
    def nbytes(self) -> int:
        return self.n * self.size


class Parameter(Value):
    """A leaf of rows x columns elements in the storage of its group; `node` gathers its gradient."""

    __slots__ = ("gradient", "group", "rows")

    def __init__(self, rows: int, n: int, size: int, group: Group) -> None:
        super().__init__(n, size, None)
        self.rows, self.group, self.gradient = rows, group, None
        group.parameters.append(self)


class Group:
    """Parameters that are gathered and reduced together."""

    def __init__(self) -> None:
        self.parameters: list[Parameter] = []
        self.live = self  # the group of another tape that stands for the same parameters

    @property
    def n(self) -> int:
        return sum(p.n for p in self.parameters)


class Leaf(Node):
    __slots__ = ("parameter",)

    def __init__(self, parameter: Parameter) -> None:
        super().__init__(-1, (), None, lambda g: ())
        self.parameter = parameter


class Source(Node):
    """An input of a block that is computed again."""

    __slots__ = ("gradient",)
    gradient: Bytes | None


class Tape:
    """size: bytes of an element of parameters and activations as they compute. training: dropout drops."""

    def __init__(self, size: int = 4, recording: bool = True) -> None:
        self.size, self.meter = size, Meter()
        self.numbers = count()
        self.group = self.root = Group()
        self.parameters: list[Parameter] = []
        self.leaves: dict[int, Leaf] = {}
        self.kind = "activations"
        self.accumulates = False  # gradients of earlier micro-batches are there, and take the new ones in
        self.autocast = False  # products in 2 bytes beside parameters in 4
        self.casts: dict[int, Value] = {}  # of parameters, which autocast keeps until the step ends
        self.shared: dict[str, Parameter] = {}
        self.recording = True  # what gradients need is kept
        self.replayed: Iterator[Parameter] | None = None  # those of a block that is computed again
        self.products: list[Bytes] | None = None  # selective checkpointing: what products gave

    # ----------------------------------------------------------------------------------------------------------- building

    def bytes(self, n: int, size: int | None = None, kind: str | None = None) -> Bytes:
        return Bytes(self.meter, n * (self.size if size is None else size), kind or self.kind)

    def constant(self, n: int, size: int | None = None) -> Value:
        """A value without a gradient."""
        size = self.size if size is None else size
        return Value(n, size, self.bytes(n, size))

    def parameter(self, rows: int, columns: int = 1) -> Parameter:
        if self.replayed is not None:
            return next(self.replayed)
        made = Parameter(rows, rows * columns, self.size, self.group)
        self.parameters.append(made)
        leaf = Leaf(made)
        self.leaves[id(made)] = leaf
        made.edge = (leaf, 0)
        return made

    def made(self, inputs: Sequence[Value], n: int, size: int, saved: Any, backward: Callable[..., Gradients], storage: Bytes | None = None) -> Value:
        """The result of an operation on `inputs`. saved: what its gradient reads; backward: the result's gradient -> those of the inputs."""
        storage = Bytes(self.meter, n * size, self.kind) if storage is None else storage
        edges = tuple(x.edge for x in inputs)
        if not self.recording or all(edge is None for edge in edges):
            return Value(n, size, storage)
        return Value(n, size, storage, (Node(next(self.numbers), edges, saved, backward), 0))

    def like(self, x: Value) -> Bytes:
        return Bytes(self.meter, x.n * x.size, self.kind)

    # --------------------------------------------------------------------------------------------------------- operations

    def linear(self, x: Value, inputs: int, outputs: int, bias: bool = False, weight: Value | None = None) -> Value:
        """x times a matrix [outputs, inputs]."""
        own = self.parameter(outputs, inputs) if weight is None else weight
        shift = [self.low(self.parameter(outputs))] if bias else []
        x, weight = self.low(x), self.low(own)
        wants = x.edge is not None

        def backward(g: Bytes) -> Gradients:
            of_bias = [self.bytes(outputs, x_size)] if bias else []
            of_weight = self.bytes(inputs * outputs, x_size)
            return (Bytes(self.meter, x_bytes, self.kind) if wants else None, of_weight, *of_bias)

        x_size, x_bytes = x.size, x.n * x.size
        n = x.n // inputs * outputs
        return self.made([x, weight, *shift], n, x.size, x.storage, backward, self.product(n, x.size))

    def product(self, n: int, size: int) -> Bytes:
        """The storage of a product's result: under selective checkpointing it is kept for the second time."""
        if self.products is None:
            return self.bytes(n, size)
        if self.replayed is not None:
            return self.products.pop(0)
        self.products.append(self.bytes(n, size))
        return self.products[-1]

    def pointwise(self, x: Value, keeps: str = "input", temporaries: int = 0) -> Value:
        """A function of each element; keeps: input, result, or nothing, for its gradient."""
        out = self.like(x)
        nbytes = x.nbytes

        def backward(g: Bytes) -> Gradients:
            held = [Bytes(self.meter, nbytes, self.kind) for _ in range(temporaries)]
            made = Bytes(self.meter, nbytes, self.kind)
            del held
            return (made,)

        saved = {"input": x.storage, "result": out, "nothing": None}[keeps]
        return self.made([x], x.n, x.size, saved, backward, out)

    def activation(self, x: Value, name: str) -> Value:
        if name == "relu2":
            return self.square(self.pointwise(x, "result"))
        return self.pointwise(x, "result" if name in ("relu", "tanh") else "input")

    def square(self, x: Value) -> Value:
        return self.pointwise(x, "input", temporaries=2)

    def scaled(self, x: Value) -> Value:
        """Times a number."""
        return self.pointwise(x, "nothing")

    def mul(self, a: Value, b: Value) -> Value:
        """Elementwise; the smaller is repeated."""
        n, size = max(a.n, b.n), max(a.size, b.size)
        saved = (b.storage if a.edge else None, a.storage if b.edge else None)

        def backward(g: Bytes) -> Gradients:
            wide = [self.bytes(n, size) if wanted else None for wanted in wants]
            return tuple(self._summed(w, small, size) for w, small in zip(wide, sizes, strict=True))

        wants, sizes = (a.edge is not None, b.edge is not None), (a.n if a.n < n else 0, b.n if b.n < n else 0)
        return self.made([a, b], n, size, saved, backward)

    def _summed(self, gradient: Bytes | None, n: int, size: int) -> Bytes | None:
        return self.bytes(n, size) if n and gradient is not None else gradient

    def add(self, a: Value, b: Value, minus: bool = False) -> Value:
        n, size = max(a.n, b.n), max(a.size, b.size)

        def backward(g: Bytes) -> Gradients:
            second = self.bytes(n, size) if minus and wants[1] else g
            both = [self._summed(x if wanted else None, small, size) for x, wanted, small in zip((g, second), wants, sizes, strict=True)]
            return tuple(x if x is None or own == size else self.bytes(n, own) for x, own in zip(both, own_sizes, strict=True))

        wants, sizes = (a.edge is not None, b.edge is not None), (a.n if a.n < n else 0, b.n if b.n < n else 0)
        own_sizes = (a.size, b.size)
        return self.made([a, b], n, size, None, backward)

    def mean(self, x: Value, n: int) -> Value:
        """Over all but n."""
        full, size = x.n, x.size
        return self.made([x], n, size, None, lambda g: (self.bytes(full, size),))

    def softmax(self, x: Value) -> Value:
        return self.pointwise(x, "result")

    def dropout(self, x: Value, p: float) -> Value:
        """On the CPU a mask of the values' own type."""
        return self.mul(x, self.constant(x.n, x.size)) if p else x

    def copy(self, x: Value) -> Value:
        """Forward, for another order of dimensions; the gradient is a view."""
        return self.made([x], x.n, x.size, None, lambda g: (g,))

    def back_copied(self, x: Value) -> Value:
        """The value itself, whose gradient has to be copied into another order of dimensions."""
        if x.edge is None:
            return x
        nbytes = x.nbytes
        return self.made([x], x.n, x.size, None, lambda g: (Bytes(self.meter, nbytes, self.kind),), x.storage)

    def to(self, x: Value, size: int) -> Value:
        """Another precision."""
        if x.size == size:
            return x
        before = x.nbytes
        return self.made([x], x.n, size, None, lambda g: (Bytes(self.meter, before, self.kind),))

    def split(self, x: Value, *parts: int) -> list[Value]:
        """Views of so many elements each; their gradients are put together again."""
        nbytes, size = x.nbytes, x.size
        if x.edge is None:
            return [Value(n, size, x.storage) for n in parts]
        node = Node(next(self.numbers), (x.edge,), None, lambda *g: (Bytes(self.meter, nbytes, self.kind),))
        return [Value(n, size, x.storage, (node, i)) for i, n in enumerate(parts)]

    def cat(self, *parts: Value) -> Value:
        k = len(parts)
        return self.made(parts, sum(p.n for p in parts), parts[0].size, None, lambda g: (g,) * k)

    def expanded(self, x: Value, n: int) -> Value:
        """A view that repeats x; its gradient is summed."""
        nbytes = x.nbytes
        return self.made([x], n, x.size, None, lambda g: (Bytes(self.meter, nbytes, self.kind),), x.storage)

    def layer_norm(self, x: Value, size: int, bias: bool) -> Value:
        weights = [self.parameter(size) for _ in range(2 if bias else 1)]
        statistics = self.bytes(2 * x.n // size, 4)
        nbytes, wide = x.nbytes, x.size

        def backward(g: Bytes) -> Gradients:
            return (Bytes(self.meter, nbytes, self.kind), *(self.bytes(size, wide) for _ in weights))

        return self.made([x, *weights], x.n, x.size, (x.storage, statistics), backward)

    def rms_norm(self, x: Value, size: int, unit_offset: bool) -> Value:
        """By elementary operations, as on the CPU; in half precision by way of float32."""
        weight: Value = self.parameter(size)
        wide = self.to(x, 4)
        r = self.pointwise(self.mean(self.square(wide), x.n // size), "result")
        y = self.mul(wide, r)
        if unit_offset:
            weight = self.made([weight], size, weight.size, None, lambda g: (g,))
        if x.size == 4:
            return self.mul(y, weight)
        return self.to(self.mul(y, self.to(weight, 4)), x.size) if unit_offset else self.mul(self.to(y, x.size), weight)

    def matmul(self, a: Value, b: Value, n: int) -> Value:
        """A product of n elements; both operands are kept."""

        def backward(g: Bytes) -> Gradients:
            return tuple(Bytes(self.meter, nbytes, self.kind) if nbytes else None for nbytes in sizes)

        sizes = [x.nbytes if x.edge else 0 for x in (a, b)]
        return self.made([a, b], n, a.size, (a.storage, b.storage), backward, self.product(n, a.size))

    def lookup(self, table: Parameter, n: int, columns: int, index: int = 0) -> Value:
        """n rows of a table. index: bytes of which, where they are made for it."""
        nbytes = table.nbytes
        kept = Bytes(self.meter, index, self.kind) if index else None
        return self.made([table], n * columns, table.size, kept, lambda g: (Bytes(self.meter, nbytes, self.kind),))

    def picked(self, x: Value, n: int, index: int) -> Value:
        """n elements of x, by an index of so many bytes that is kept."""
        kept, nbytes = Bytes(self.meter, index, self.kind) if index else None, x.nbytes
        return self.made([x], n, x.size, kept, lambda g: (Bytes(self.meter, nbytes, self.kind),))

    def sliced(self, x: Value, n: int, copies: bool = False) -> Value:
        """n elements of x, as a view. copies: it is read by what wants them side by side."""
        nbytes = x.nbytes
        view = self.made([x], n, x.size, None, lambda g: (Bytes(self.meter, nbytes, self.kind),), x.storage)
        return self.copy(view) if copies else view

    def added_up(self, x: Value, n: int, order: Value) -> Value:
        """Rows of x added into n elements of zeros; torch keeps the rows, though it needs but their shape."""
        zeros, nbytes = self.bytes(n, x.size), x.nbytes
        made = self.made([x], n, x.size, (order.storage, x.storage), lambda g: (Bytes(self.meter, nbytes, self.kind),))
        del zeros
        return made

    def grouped(self, x: Value, inputs: int, outputs: int, experts: int) -> Value:
        """Rows of x, each times the matrix of its expert."""
        x, weight = self.low(x), self.low(self.parameter(experts, inputs * outputs))
        nbytes, whole = x.nbytes, weight.n * x.size

        def backward(g: Bytes) -> Gradients:
            return Bytes(self.meter, nbytes, self.kind), Bytes(self.meter, whole, self.kind)

        return self.made([x, weight], x.n // inputs * outputs, x.size, x.storage, backward)

    def chunked_loss(self, x: Value, weight: Value, shift: Value | None, dim: int, vocabulary: int, capped: bool) -> Value:
        """`head.ChunkedCrossEntropy`: gradients are made in the forward, by chunks of tokens."""
        n, rows = x.n // dim, max(1, CHUNK_ELEMENTS // vocabulary)
        x, weight, shift = self.low(x), self.low(weight), None if shift is None else self.low(shift)
        gradients = [self.bytes(x.n, x.size), self.bytes(weight.n, x.size), *([self.bytes(vocabulary, 4)] if shift else [])]
        for start in range(0, min(n, 2 * rows), rows):  # the third chunk and those after it are like the second
            chunk = min(rows, n - start) * vocabulary
            slope = self._logits(chunk, x.size, capped)  # that of the chunk before is held meanwhile
            slope = self.bytes(chunk, 4)  # divided
            if x.size != 4:
                slope = self.bytes(chunk, x.size)
            self.bytes(chunk // vocabulary * dim, x.size)
        del slope
        sizes = [g.n for g in gradients]

        def backward(g: Bytes) -> Gradients:
            return tuple(Bytes(self.meter, nbytes, self.kind) for nbytes in sizes)

        return self.made([x, weight, *([shift] if shift else [])], 1, 4, gradients, backward)

    def _logits(self, n: int, size: int, capped: bool) -> Bytes:
        """In float32, which become their gradient in place. A cap has a slope of its own."""
        logits = self.bytes(n, size)
        if size != 4:
            logits = self.bytes(n, 4)
        if capped:
            ratio = self.bytes(n, 4)
            squared = self.bytes(n, 4)
            del ratio
            slope = self.bytes(n, 4)
            del squared, slope
        return logits

    def kept(self, name: str, make: Callable[[], Parameter]) -> Parameter:
        """A parameter that several parts of the model share."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]

    def checkpoint(self, block: Callable[..., Value], inputs: Sequence[Value], selective: bool) -> Value:
        """A block whose forward keeps its inputs alone (selective: and what products gave), and is computed again in the backward."""
        self.recording, first = False, len(self.parameters)
        self.products = [] if selective else None
        plain = [Value(x.n, x.size, x.storage) for x in inputs]
        out = block(self, *plain)
        del plain
        self.recording, products, self.products = True, self.products, None
        own = self.parameters[first:]
        copies = [(x.n, x.size, x.storage, x.edge is not None) for x in inputs]

        def backward(g: Bytes) -> Gradients:
            sources = [Source(-2 - i, (), None, _done) for i in range(len(copies))]
            values = [Value(n, size, storage, (s, 0) if wants else None) for (n, size, storage, wants), s in zip(copies, sources, strict=True)]
            copies.clear()
            self.replayed, self.products, before, self.kind = iter(own), products, self.kind, "recomputed"
            result = block(self, *values)
            self.replayed, self.products, self.kind = None, None, before
            result.storage = None  # the last sum is not computed again
            del values
            self.backward(result, g)
            return tuple(source.gradient for source in sources)

        return self.made(inputs, out.n, out.size, None, backward, out.storage)

    def hook(self, x: Value, act: Callable[[], None]) -> Value:
        """The value itself; `act` when its gradient is complete."""

        def backward(g: Bytes) -> Gradients:
            act()
            return (g,)

        return self.made([x], x.n, x.size, None, backward, x.storage)

    def low(self, x: Value) -> Value:
        """As autocast has it: in 2 bytes, parameters once for all their uses."""
        if not self.autocast or x.size == 2:
            return x
        if not isinstance(x, Parameter):
            return self.to(x, 2)
        if id(x) not in self.casts:
            self.casts[id(x)] = self.to(x, 2)
        return self.casts[id(x)]

    # ----------------------------------------------------------------------------------------------------------- backward

    def backward(self, root: Value, gradient: Bytes | None = None) -> None:
        """Gradients of all parameters, in autograd's order: the latest operation first. gradient: of the root, which needs none."""
        assert root.edge is not None
        before, self.kind = self.kind, "temporaries"
        first, i = root.edge
        waiting = _dependencies(first)
        given: dict[Node, dict[int, Bytes]] = {first: {i: self.like(root) if gradient is None else gradient}}
        gradient = None
        ready = [(-first.number, first)]
        root.edge, root.storage = None, None
        del first
        while ready:
            node = heapq.heappop(ready)[1]
            for edge, made in self._stepped(node, given.pop(node, {})):
                self._sent(edge, made, waiting, given, ready)
            del edge, made
        self.kind = before

    def _stepped(self, node: Node, given: dict[int, Bytes]) -> list[tuple[tuple[Node, int], Bytes | None]]:
        if given:
            made = node.backward(given.get(0, next(iter(given.values()))))
        else:
            made = (None,) * len(node.edges)
        node.saved, node.backward = None, _done
        sent = [(edge, g) for edge, g in zip(node.edges, made, strict=True) if edge is not None]
        sent.reverse()
        return sent

    def _sent(self, edge: tuple[Node, int], gradient: Bytes | None, waiting: dict[Node, int], given: Any, ready: Any) -> None:
        node, i = edge
        waiting[node] -= 1
        if gradient is not None:
            held = given.setdefault(node, {})
            # Out of place, as autograd does while a tracker watches; without one it adds in place where nobody else holds the first.
            held[i] = Bytes(self.meter, gradient.n, self.kind) if i in held else gradient
        if waiting[node] == 0:
            if isinstance(node, Leaf):
                self._arrived(node.parameter, given.pop(node, {}).get(0))
            elif isinstance(node, Source):
                node.gradient = given.pop(node, {}).get(0)
            else:
                heapq.heappush(ready, (-node.number, node))

    def _arrived(self, parameter: Parameter, gradient: Bytes | None) -> None:
        if gradient is None:
            return
        if parameter.gradient is None and not self.accumulates:
            parameter.gradient = gradient.becomes("gradients")


def _done(*_: Any) -> Gradients:
    raise AssertionError("a backward went through here before")


def _dependencies(root: Node) -> dict[Node, int]:
    """How many gradients each node waits for."""
    found: dict[Node, int] = {root: 0}
    stack = [root]
    while stack:
        for edge in stack.pop().edges:
            if edge is None:
                continue
            node = edge[0]
            if node not in found:
                found[node] = 0
                stack.append(node)
            found[node] += 1
    return found

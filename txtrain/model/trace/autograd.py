"""A forward and its backward in bytes: what autograd allocates, saves and frees, in its order. No torch.

A component's config describes its module's computation (`trace`) in the operations of tape.py. An operation allocates
its result, saves what its gradient needs, and knows what its gradient allocates. Bytes are freed by Python's reference
count, as in torch. Nothing is computed, and no number is rounded.
"""

from __future__ import annotations

import contextlib
import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

Gradients = tuple["Bytes | None", ...]
Backward = Callable[..., Gradients]
Edge = tuple["Node", int]  # a node, and which of its results


class Meter:
    """Bytes held, by kind, now and at the peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.by_kind: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}

    def take(self, n: int, kind: str) -> None:
        self.now += n
        self.by_kind[kind] = self.by_kind.get(kind, 0) + n
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self.by_kind)

    def give(self, n: int, kind: str) -> None:
        self.now -= n
        self.by_kind[kind] -= n


class Bytes:
    """A storage: taken from the meter when made, given back when nothing refers to it."""

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
    """Turns a value's gradient into those of its inputs, then frees `saved`."""

    __slots__ = ("backward", "edges", "number", "saved")

    def __init__(self, number: int, edges: Sequence[Edge | None], saved: Any, backward: Backward) -> None:
        self.number, self.edges, self.saved, self.backward = number, edges, saved, backward


class Value:
    """n elements of `size` bytes each. edge: the node that made it, and which of its results; None without gradient."""

    __slots__ = ("edge", "n", "size", "storage")

    def __init__(self, n: int, size: int, storage: Bytes | None, edge: Edge | None = None) -> None:
        self.n, self.size, self.storage, self.edge = n, size, storage, edge

    @property
    def nbytes(self) -> int:
        return self.n * self.size


class Parameter(Value):
    """A leaf in the storage of its group. name: canonical."""

    __slots__ = ("gradient", "group", "name", "shape")
    gradient: Bytes | None

    def __init__(self, name: str, shape: tuple[int, ...], size: int, group: Group) -> None:
        super().__init__(math.prod(shape), size, None)
        self.name, self.shape, self.group, self.gradient = name, shape, group, None
        group.parameters.append(self)


class Group:
    """Parameters that are gathered and reduced together."""

    def __init__(self) -> None:
        self.parameters: list[Parameter] = []
        self.live = self  # another tape's group of the same parameters

    @property
    def n(self) -> int:
        return sum(p.n for p in self.parameters)


class Leaf(Node):
    __slots__ = ("parameter",)

    def __init__(self, parameter: Parameter) -> None:
        super().__init__(-1, (), None, lambda g: ())
        self.parameter = parameter


class Recomputed(NamedTuple):
    """What an operation of a recomputed block saves, and which of the block's it is."""

    again: Again
    i: int


class Again:
    """A block that is recomputed in the backward. As in torch, its operations are nodes of the first forward's graph,
    and get what they would have saved from the recomputation, which ends once it has all of it."""

    def __init__(
        self, block: Callable[..., Value], inputs: Sequence[Value], path: str, products: list[Bytes] | None
    ) -> None:
        self.block, self.path, self.products = block, path, products
        self.inputs = [(x.n, x.size, x.storage, x.edge is not None) for x in inputs]
        self.own: Sequence[Parameter] = ()
        self.n = 0  # operations that save something
        self.found: list[Any] | None = None  # by operation, once recomputed

    def saved(self, saved: Any) -> Recomputed | None:
        if self.found is None:
            self.n += 1
            return Recomputed(self, self.n - 1)
        self.found.append(saved)
        if len(self.found) == self.n:
            raise _AllFound
        return None


class _AllFound(Exception):
    """A recomputation has all that its block saves."""


class Recorder:
    """size: bytes per element. trains: whether the parameter of that canonical name takes a gradient."""

    def __init__(self, size: int = 4, trains: Callable[[str], bool] = lambda name: True) -> None:
        self.size, self.meter, self.trains = size, Meter(), trains
        self.rank: Callable[[str], int] = lambda matrix: 0  # of a matrix' adapter; 0: it has none
        self.adapter_dropout = self.adapter_flops = 0.0
        self.forward_flops = self.backward_flops = 0.0  # of products; a window hides keys, no other mask does
        self.numbers = count()
        self.group = self.root = Group()
        self.parameters: list[Parameter] = []
        self.path = ""  # of the current module
        self.sent: Counter[str] = Counter()  # bytes of whole buffers, by collective
        self.kind = "activations"
        self.accumulates = False  # gradients of earlier micro-batches exist; new ones are added to them
        self.arrived: Callable[[Parameter], None] | None = None  # called when a parameter's gradient is complete
        self.lies: Callable[[Parameter], Bytes | None] | None = None  # a parameter's storage, if its lifetime matters
        self.autocast = False  # products in 2 bytes, parameters in 4
        self.casts: dict[int, Value] = {}  # of parameters, which autocast keeps until the step ends
        self.shared: dict[str, Parameter] = {}
        self.replayed: Iterator[Parameter] | None = None  # parameters of a block that is recomputed
        self.again: Again | None = None  # the block that is computed, if it is to be recomputed, or is
        self.products: list[Bytes] | None = None  # selective checkpointing: results of products

    def bytes(self, n: int, size: int | None = None, kind: str | None = None) -> Bytes:
        return Bytes(self.meter, n * (self.size if size is None else size), kind or self.kind)

    def constant(self, n: int, size: int | None = None) -> Value:
        """A value without a gradient."""
        size = self.size if size is None else size
        return Value(n, size, self.bytes(n, size))

    @contextlib.contextmanager
    def having(self, **values: Any) -> Iterator[None]:
        """With other values of these attributes."""
        before = {name: vars(self)[name] for name in values}
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(before)

    def at(self, path: str) -> contextlib.AbstractContextManager[None]:
        """Parameters made here belong to the module of that name; `within`: of that name within the current one."""
        return self.having(path=path)

    def within(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self.at(dotted(self.path, name))

    def named(self, name: str, trace: Callable[..., Value], *args: Any) -> Value:
        """The trace of a module within the current one."""
        with self.within(name):
            return trace(*args)

    def parameter(self, *shape: int, name: str = "weight") -> Parameter:
        if self.replayed is not None:
            return next(self.replayed)
        made = Parameter(dotted(self.path, name), shape, self.size, self.group)
        self.parameters.append(made)
        if self.trains(made.name):
            made.edge = (Leaf(made), 0)
        if self.lies is not None:
            made.storage = self.lies(made)
        return made

    def made(
        self, inputs: Sequence[Value], n: int, size: int, saved: Any, backward: Backward, storage: Bytes | None = None
    ) -> Value:
        """An operation's result. saved: what its gradient reads; backward: the result's gradient -> the inputs'."""
        storage = Bytes(self.meter, n * size, self.kind) if storage is None else storage
        edges = tuple(x.edge for x in inputs)
        if all(edge is None for edge in edges):
            return Value(n, size, storage)
        if self.again is not None and _holds(saved):
            saved = self.again.saved(saved)
        return Value(n, size, storage, (Node(next(self.numbers), edges, saved, backward), 0))

    def multiplied(self, flops: float, *operands: Value) -> None:
        """Count a product, which costs as much again in the backward for each operand that takes a gradient."""
        self.forward_flops += flops
        self.backward_flops += flops * sum(x.edge is not None for x in operands)

    def like(self, x: Value) -> Bytes:
        return self.bytes(x.nbytes, 1)

    def product(self, n: int, size: int) -> Bytes:
        """The storage of a product's result, which selective checkpointing keeps for the recomputation."""
        if self.products is None:
            return self.bytes(n, size)
        if self.replayed is not None:
            return self.products.pop(0)
        self.products.append(self.bytes(n, size))
        return self.products[-1]

    def detached(self, x: Value) -> Value:
        """The same value as a leaf whose gradient is wanted."""
        return Value(x.n, x.size, x.storage, (Node(next(self.numbers), (), None, lambda g: ()), 0))

    def hook(self, x: Value, act: Callable[[], None]) -> Value:
        """The value itself; calls `act` when its gradient is complete."""

        def backward(g: Bytes) -> Gradients:
            act()
            return (g,)

        return self.made([x], x.n, x.size, None, backward, x.storage)

    def checkpoint(self, block: Callable[..., Value], inputs: Sequence[Value], selective: bool) -> Value:
        """A block that keeps its inputs (selective: and results of products), and is recomputed in the backward when
        the first gradient is due that reads what the block would have saved."""
        self.products = [] if selective else None
        self.again, first = Again(block, inputs, self.path, self.products), len(self.parameters)
        out = block(self, *inputs)
        self.again.own, self.again, self.products = self.parameters[first:], None, None
        return out

    def _recompute(self, again: Again) -> None:
        before = self.forward_flops, self.backward_flops
        values = [Value(n, size, storage, NOWHERE if wants else None) for n, size, storage, wants in again.inputs]
        state = {"again": again, "replayed": iter(again.own), "products": again.products, "path": again.path}
        again.found = []
        with contextlib.suppress(_AllFound), self.having(**state, kind="recomputed"):
            again.block(self, *values)
        assert len(again.found) == again.n, "a block saves as much when it is recomputed"
        self.forward_flops, self.backward_flops = before

    def backward(self, root: Value) -> None:
        """Gradients of all parameters, in autograd's order: the latest operation first."""
        assert root.edge is not None
        before, self.kind = self.kind, "temporaries"
        first, i = root.edge
        waiting = _dependencies(first)
        given: dict[Node, dict[int, Bytes]] = {first: {i: self.like(root)}}
        ready = [(-first.number, first)]
        root.edge, root.storage = None, None
        del first
        while ready:
            node = heapq.heappop(ready)[1]
            made = self._stepped(node, given.pop(node, {}))
            while made:
                self._sent(made, waiting, given, ready)
        self.kind = before

    def _stepped(self, node: Node, given: dict[int, Bytes]) -> list[tuple[Edge, Bytes | None]]:
        if given:
            if isinstance(node.saved, Recomputed):
                node.saved = self._found(*node.saved)
            made = node.backward(given.get(0, next(iter(given.values()))))
        else:
            made = (None,) * len(node.edges)
        node.saved, node.backward = None, _done
        return [(edge, g) for edge, g in zip(node.edges, made, strict=True) if edge is not None]

    def _found(self, again: Again, i: int) -> Any:
        if again.found is None:
            self._recompute(again)
        assert again.found is not None
        found, again.found[i] = again.found[i], None
        return found

    def _sent(self, made: list[tuple[Edge, Bytes | None]], waiting: Any, given: Any, ready: Any) -> None:
        """Send on the last of these gradients, whose only reference then is the receiver's."""
        (node, i), gradient = made.pop()
        waiting[node] -= 1
        if gradient is not None:
            held = given.setdefault(node, {})
            # Out of place, as autograd under a tracker; without one it adds in place if nothing else holds the first.
            held[i] = Bytes(self.meter, gradient.n, self.kind) if i in held else gradient
            gradient = None
            del held
        if waiting[node] == 0:
            if isinstance(node, Leaf):
                self._arrived(node.parameter, given.pop(node, {}).get(0))
            else:
                heapq.heappush(ready, (-node.number, node))

    def _arrived(self, parameter: Parameter, gradient: Bytes | None) -> None:
        if gradient is None:
            return
        if parameter.gradient is None and not self.accumulates:
            parameter.gradient = gradient.becomes("gradients")
        del gradient
        if self.arrived is not None:
            self.arrived(parameter)


def _holds(saved: Any) -> bool:
    return any(map(_holds, saved)) if isinstance(saved, (tuple, list)) else saved is not None


def dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _done(*_: Any) -> Gradients:
    raise AssertionError("this node's backward has already run")


NOWHERE: Edge = (Node(-1, (), None, _done), 0)  # of a recomputed block's inputs: its graph is dropped


def _dependencies(root: Node) -> dict[Node, int]:
    """How many gradients each node waits for."""
    found: dict[Node, int] = {root: 0}
    stack = [root]
    while stack:
        for node, _ in filter(None, stack.pop().edges):
            if node not in found:
                found[node] = 0
                stack.append(node)
            found[node] += 1
    return found

"""Pieces that several components compute alike: rotations, and attention by each kernel."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

from txtrain.model.attention.kernel_choice import Declared, Kernel, choose_kernel
from txtrain.model.trace.tape import Bytes, Gradients, Tape, Value


@dc.dataclass(frozen=True)
class Drawn:
    """A mask as its kernel reads it. bias, visible, additive: of how many elements, and whether they take a gradient."""

    declared: Declared
    kernel: Kernel
    bias: Value | None = None
    visible: Value | None = None


@dc.dataclass(frozen=True)
class Place:
    """Where a component computes: B sequences of `queries` positions, which attend to `keys` positions."""

    model: Any
    layer: int
    batch: int
    queries: int
    keys: int
    rotation: tuple[Value, Value] | None = None
    mask: Drawn | None = None
    memory: Value | None = None  # what is attended to, where it is another stack's output
    device: str = "cpu"
    scale: Value | None = None  # of auxiliary losses
    first: bool = False  # of the blocks of its stack
    last: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.queries


@dc.dataclass(frozen=True)
class Batch:
    """n samples of `source` positions, and `target` of a second stack.

    source_masked, target_masked: what hides positions there, as `Declared` names it. chosen: positions that the head reads; None: all.
    smoothed: the loss takes all logits at once. types: each token's segment is given.
    """

    n: int
    source: int
    target: int | None
    source_masked: dict[str, bool]
    target_masked: dict[str, bool]
    chosen: int | None = None
    smoothed: bool = False
    types: bool = False


def rotated(t: Tape, x: Value, rotation: tuple[Value, Value] | None, several: bool) -> Value:
    """Halves turned by their angle. several: heads, so that the gradient lies in another order than the projection's."""
    if rotation is None:
        return x
    cos, sin = rotation
    a, b = t.split(t.back_copied(x) if several else x, x.n // 2, x.n // 2)
    turned = t.cat(t.add(t.mul(a, cos), t.mul(b, sin), minus=True), t.add(t.mul(b, cos), t.mul(a, sin)))
    return t.to(turned, x.size)


def gated(t: Tape, x: Value, dim: int, width: int, activation: str, dropout: float, bias: bool = False) -> Value:
    """down(act(gate(x)) * up(x))."""
    h = t.mul(t.activation(t.linear(x, dim, width, bias, name="gate_proj"), activation), t.linear(x, dim, width, bias, name="up_proj"))
    return t.linear(t.dropout(h, dropout), width, dim, bias, name="down_proj")


def choose(declared: Declared, device: str, bias: Value | None, softcap: bool, dropout: float, size: int) -> Kernel:
    return choose_kernel(declared, device_type=device, softcap=softcap, bias=bias is not None, dropout=dropout > 0, half=size == 2)


def draw(t: Tape, declared: Declared, kernel: Kernel, bias: Value | None, batch: int) -> Drawn:
    """What `mask.prepare` makes."""
    if kernel in ("sdpa", "flex", "varlen"):
        return Drawn(declared, kernel, bias)
    of_rows = declared.documents_BS or declared.valid_BS or declared.prefix_BS
    visible = None if declared.sees_all else t.constant((batch if of_rows else 1) * declared.n_queries * declared.n_keys, 1)
    if kernel == "plain" or bias is None or visible is None:
        return Drawn(declared, kernel, bias, visible)
    return Drawn(declared, kernel, _filled(t, bias, max(bias.n, visible.n * (bias.n // (declared.n_queries * declared.n_keys))), visible))


def attend(t: Tape, q: Value, k: Value, v: Value, place: Place, heads: tuple[int, int], softcap: bool, dropout: float, same_size: bool) -> Value:
    """heads: of queries, and of keys. same_size: heads of values are as large as those of keys, which flash attention asks for."""
    mask = place.mask
    assert mask is not None
    scores, across = place.batch * heads[0] * place.queries * place.keys, place.memory is not None
    reach = place.keys if across else place.model.attention.seen(place.keys, place.layer, causal=mask.declared.causal)
    t.multiplied(2.0 * q.n * reach, q, k)  # scores, then what they weigh
    t.multiplied(2.0 * q.n * reach * v.n / k.n, q if q.edge else k, v)
    if mask.kernel == "plain":
        return _plain(t, q, k, v, mask, scores, heads, softcap, dropout)
    if mask.kernel in ("flex", "varlen"):
        return _flash(t, q, k, v, None, scores // place.keys)
    learned = mask.bias is not None and mask.bias.edge is not None
    fused = not dropout and (place.device != "cpu" or (same_size and not learned))
    if not fused:
        return _math(t, q, k, v, mask, scores, heads, dropout, place)
    added = mask.bias if mask.bias is not None else mask.visible
    if mask.bias is None and added is not None:  # a boolean mask becomes one of numbers in each call
        added = t.constant(added.n, q.size)
    return _flash(t, q, k, v, added, scores // place.keys)


def _flash(t: Tape, q: Value, k: Value, v: Value, mask: Value | None, rows: int) -> Value:
    n = q.n * v.n // k.n  # heads of values may be smaller than those of keys, and a decoder's queries fewer than the keys
    out, log_sums = t.product(n, q.size), t.product(rows, 4)
    sizes = [x.nbytes for x in (q, k, v)]

    def backward(g: Bytes) -> Gradients:
        return tuple(Bytes(t.meter, nbytes, t.kind) for nbytes in sizes)

    saved = (q.storage, k.storage, v.storage, out, log_sums, None if mask is None else mask.storage)
    return t.made([q, k, v], n, q.size, saved, backward, out)


def _plain(t: Tape, q: Value, k: Value, v: Value, mask: Drawn, n_scores: int, heads: tuple[int, int], softcap: bool, dropout: float) -> Value:
    k, v = (_repeated(t, x, heads[0] // heads[1]) for x in (k, v))  # where several query heads read one
    scores = t.scaled(t.matmul(t.copy(q), k, n_scores))
    if softcap:
        scores = t.scaled(t.activation(t.scaled(scores), "tanh"))
    if mask.bias is not None:
        scores = t.add(scores, mask.bias)
    if mask.visible is not None:
        scores = _filled(t, scores, scores.n, mask.visible)
    p = t.to(t.softmax(t.to(scores, 4)), v.size)
    if mask.visible is not None and mask.declared.may_see_nothing:
        p = _filled(t, p, p.n, mask.visible)
    p = t.dropout(p, dropout)
    return t.copy(t.matmul(p, v, q.n * v.n // k.n))


def _filled(t: Tape, x: Value, n: int, where: Value) -> Value:
    """masked_fill with a mask that is inverted for it, and kept."""
    inverted = t.constant(where.n, 1)
    nbytes = n * x.size
    return t.made([x], n, x.size, inverted.storage, lambda g: (Bytes(t.meter, nbytes, t.kind),))


def _math(t: Tape, q: Value, k: Value, v: Value, mask: Drawn, n_scores: int, heads: tuple[int, int], dropout: float, place: Place) -> Value:
    """torch's own composition, where its fused kernel does not take the inputs."""
    added = mask.bias
    if added is None and (mask.visible is not None or (mask.declared.causal and place.queries > 1)):
        added = t.constant(place.queries * place.keys if mask.visible is None else mask.visible.n)
    size = q.size
    q, k, v = (t.to(x, 4) for x in (q, k, v))  # half precision is computed in float32
    q, k = t.scaled(q), t.scaled(k)
    if heads[0] != heads[1]:
        k, v = (_repeated(t, x, heads[0] // heads[1]) for x in (k, v))
    scores = t.matmul(t.copy(q), t.copy(k), n_scores)
    if added is not None:
        scores = t.add(scores, added)
    p = t.dropout(t.softmax(scores), dropout)
    return t.copy(t.to(t.matmul(p, t.copy(v), v.n // place.keys * place.queries), size))


def _repeated(t: Tape, x: Value, times: int) -> Value:
    """Heads side by side, so many times each."""
    nbytes = x.nbytes
    return t.made([x], x.n * times, x.size, None, lambda g: (Bytes(t.meter, nbytes, t.kind),))

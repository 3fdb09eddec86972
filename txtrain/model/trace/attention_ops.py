"""Traces shared by several components: rotations, gated FFNs, and attention by each kernel."""

from __future__ import annotations

import dataclasses as dc
from functools import partial
from typing import Any

from txtrain.model.attention.kernel_choice import BLOCK, Declared, Kernel, choose_kernel, together
from txtrain.model.trace.tape import Bytes, Gradients, Tape, Value


@dc.dataclass(frozen=True)
class Drawn:
    """A mask as its kernel reads it (`mask.PreparedMask`)."""

    declared: Declared
    kernel: Kernel
    bias: Value | None = None
    visible: Value | None = None


@dc.dataclass(frozen=True)
class Place:
    """Where a component computes: `batch` sequences of `queries` positions, which attend to `keys` positions."""

    model: Any
    layer: int
    batch: int
    queries: int
    keys: int
    rotation: tuple[Value, Value] | None = None
    mask: Drawn | None = None
    memory: Value | None = None  # the encoder's output, in cross-attention
    device: str = "cpu"
    scale: Value | None = None  # of auxiliary losses
    first: bool = False  # whether its block is the first of the stack
    last: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.queries


@dc.dataclass(frozen=True)
class Batch:
    """n samples of `source` positions, and of `target` positions for a decoder beside an encoder.

    source_masked, target_masked: fields of `Declared` that are set. chosen: number of positions that the head reads;
    None: all. smoothed: the labels are. types: token_type_ids are given.
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
    """`Rotation`. several: there are several heads, so that the gradient is copied into the projection's layout."""
    if rotation is None:
        return x
    cos, sin = rotation
    a, b = t.split(t.back_copied(x) if several else x, x.n // 2, x.n // 2)
    turned = t.cat(t.add(t.mul(a, cos), t.mul(b, sin), minus=True), t.add(t.mul(b, cos), t.mul(a, sin)))
    return t.to(turned, x.size)


def gated(t: Tape, x: Value, dim: int, width: int, activation: str, dropout: float, bias: bool = False) -> Value:
    """down(act(gate(x)) * up(x))."""
    linear = partial(t.linear, x, dim, width, bias)
    h = t.glu(linear(name="gate_proj"), linear(name="up_proj"), activation)
    return t.linear(t.dropout(h, dropout), width, dim, bias, name="down_proj")


def choose(declared: Declared, device: str, bias: Value | None, softcap: bool, dropout: float, size: int) -> Kernel:
    given = {"softcap": softcap, "bias": bias is not None, "dropout": dropout > 0, "half": size == 2}
    given["learned"] = bias is not None and bias.edge is not None
    return choose_kernel(declared, device_type=device, **given)


def draw(t: Tape, declared: Declared, kernel: Kernel, bias: Value | None, batch: int) -> Drawn:
    """`mask.prepare`."""
    if kernel in ("sdpa", "blocks", "flex", "varlen"):
        return Drawn(declared, kernel, t.copy(bias) if kernel == "blocks" and bias is not None else bias)
    of_rows = declared.documents_BS or declared.valid_BS or declared.prefix_BS
    n = declared.n_queries * declared.n_keys
    visible = None if declared.sees_all else t.constant((batch if of_rows else 1) * n, 1)
    if kernel == "plain" or visible is None:
        return Drawn(declared, kernel, bias, visible)
    if bias is None:
        size = 2 if t.autocast else t.size
        held = t.constant(visible.n, size), t.constant(visible.n, 1)  # zeros, and where they stay
        drawn = Drawn(declared, kernel, None, t.constant(visible.n, size))
        del held
        return drawn
    return Drawn(declared, kernel, _filled(t, bias, max(bias.n, visible.n * (bias.n // n)), visible))


def attend(
    t: Tape, q: Value, k: Value, v: Value, place: Place, heads: tuple[int, int], softcap: bool, dropout: float,
    same_size: bool,
) -> Value:
    """`kernels.attend`. heads: of queries, of keys. same_size: values have heads of the keys' size, as flash needs."""
    mask = place.mask
    assert mask is not None
    scores, across = place.batch * heads[0] * place.queries * place.keys, place.memory is not None
    reach = place.keys if across else place.model.attention.seen(place.keys, place.layer, causal=mask.declared.causal)
    t.multiplied(2.0 * q.n * reach, q, k)  # scores, then the weighted sum
    t.multiplied(2.0 * q.n * reach * v.n / k.n, q if q.edge else k, v)
    if mask.kernel == "plain":
        return _plain(t, q, k, v, mask, scores, heads, softcap, dropout)
    if mask.kernel == "blocks":
        return _blocks(t, q, k, v, place, heads, softcap)
    if mask.kernel in ("flex", "varlen"):
        return _flash(t, q, k, v, None, scores // place.keys)
    learned = mask.bias is not None and mask.bias.edge is not None
    fused = not dropout and (place.device != "cpu" or (same_size and not learned))
    if not fused:
        return _math(t, q, k, v, mask, scores, heads, dropout, place)
    return _flash(t, q, k, v, mask.bias or mask.visible, scores // place.keys)


def _flash(t: Tape, q: Value, k: Value, v: Value, mask: Value | None, rows: int) -> Value:
    n = q.n * v.n // k.n  # values may have smaller heads than keys, and there may be fewer queries than keys
    out, log_sums = t.product(n, q.size), t.product(rows, 4)
    sizes = [x.nbytes for x in (q, k, v)]

    def backward(g: Bytes) -> Gradients:
        return tuple(t.bytes(nbytes, 1) for nbytes in sizes)

    saved = (q.storage, k.storage, v.storage, out, log_sums, None if mask is None else mask.storage)
    return t.made([q, k, v], n, q.size, saved, backward, out)


def _blocks(
    t: Tape, q: Value, k: Value, v: Value, place: Place, heads: tuple[int, int], softcap: bool
) -> Value:
    """`blocks.blocked`. The last block is the largest; documents, which may make it smaller, are not counted."""
    assert place.mask is not None
    declared, n = place.mask.declared, q.n * v.n // k.n
    keys = place.keys if declared.window is None else min(place.keys, BLOCK + declared.window - 1)
    scores = BLOCK * (heads[0] // heads[1]) * keys  # of a key head
    rows, of_keys = together(scores, place.batch, heads[1])  # of a piece
    scores *= rows * of_keys
    bias, formula = place.mask.bias, softcap or place.mask.bias is not None
    if not formula:
        q, k, v = _of_one_size(t, q, k, v)
    sizes, size = [x.nbytes for x in (q, k, v)], q.size
    out = t.product(q.n * v.n // k.n, size)
    sums = None if formula else t.product(place.tokens * heads[0], 4)
    drawn = (place.batch if declared.documents_BS or declared.valid_BS else 1) * BLOCK * keys
    drawn = 0 if formula and declared.sees_all else drawn
    of_bias = bias.nbytes if bias is not None and bias.edge is not None else 0

    def work(parts: tuple[int, ...] = ()) -> None:
        hidden = t.bytes(drawn, 1 if formula else size)
        held = [t.bytes(scores, 4) for _ in range(3 if softcap else 2)] if formula else [t.bytes(n, 1) for n in parts]
        if formula and parts:  # in half precision casts of the scores' gradient, else its sum over rows for the bias
            summed = scores // rows * 4 if of_bias and rows > 1 else 0
            held.append(t.bytes(max(summed, scores * size if size < 4 else 0), 1))
        del held, hidden

    work()

    def backward(g: Bytes) -> Gradients:
        made = tuple(t.bytes(nbytes, 1) for nbytes in sizes)
        made = (*made, t.bytes(of_bias, 1)) if of_bias else made
        work(tuple(nbytes // place.keys * keys for nbytes in sizes[1:]))
        return made if bias is None or of_bias else (*made, None)

    inputs, saved = [q, k, v, *([bias] if bias else [])], (q.storage, k.storage, v.storage, out, sums)
    made = t.made(inputs, q.n * v.n // k.n, size, (*saved, bias.storage if bias else None), backward, out)
    return t.sliced(made, n) if made.n != n else made


def _of_one_size(t: Tape, q: Value, k: Value, v: Value) -> tuple[Value, Value, Value]:
    """`blocks.of_one_size`: what has the smaller heads is padded; so many heads of keys as of values."""
    if v.n < k.n:
        return q, k, t.unary(v, k.n)
    return (q, k, v) if v.n == k.n else (t.unary(q, q.n * v.n // k.n), t.unary(k, v.n), v)


def _plain(
    t: Tape, q: Value, k: Value, v: Value, mask: Drawn, n_scores: int, heads: tuple[int, int], softcap: bool,
    dropout: float,
) -> Value:
    k, v = (t.repeated(x, heads[0] // heads[1]) for x in (k, v))  # where several query heads share one
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
    """masked_fill with an inverted mask, which is saved."""
    inverted, nbytes = t.constant(where.n, 1), n * x.size
    return t.made([x], n, x.size, inverted.storage, lambda g: (t.bytes(nbytes, 1),))


def _math(
    t: Tape, q: Value, k: Value, v: Value, mask: Drawn, n_scores: int, heads: tuple[int, int], dropout: float,
    place: Place,
) -> Value:
    """torch's composition, for inputs that its fused kernel does not take."""
    added = mask.bias or mask.visible
    if added is None and mask.declared.causal and place.queries > 1:
        added = t.constant(place.queries * place.keys)
    size = q.size
    q, k, v = (t.to(x, 4) for x in (q, k, v))  # half precision is computed in float32
    q, k = t.scaled(q), t.scaled(k)
    if heads[0] != heads[1]:
        k, v = (t.repeated(x, heads[0] // heads[1]) for x in (k, v))
    scores = t.matmul(t.copy(q), t.copy(k), n_scores)
    if added is not None:
        scores = t.add(scores, added)
    p = t.dropout(t.softmax(scores), dropout)
    return t.copy(t.to(t.matmul(p, t.copy(v), v.n // place.keys * place.queries), size))

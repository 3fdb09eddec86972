"""The base of every option's config."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

from txtrain.errors import divisors_near
from txtrain.model.construct import count_parameters
from txtrain.model.shape import ModelShape
from txtrain.model.trace.attention_ops import Place
from txtrain.model.trace.tape import Tape, Value
from txtrain.registry import config


class Size(NamedTuple):
    """A number that ranks must divide, and its key. shared: more ranks may share one, as with key-value heads."""

    key: str
    value: int
    shared: bool = False

    def fits(self, n: int) -> bool:
        return self.value % n == 0 or (self.shared and n % self.value == 0)


def must_divide(key: str, value: int, whole: str, total: int, unless: str = "") -> str:
    """The sentence for a number that must divide another one."""
    near = ", ".join(map(str, divisors_near(value, total)))
    return f"`{key}` must divide {whole} ({total}){unless}, but is {value} instead. Nearest: {near}."


@config
class Component:
    """Base of every option's config.

    Parameters of a user's own option without closed forms are counted on the module, built on the meta device; `plan`
    says what is missing of FLOPs, cache and memory.
    """

    type: str

    def check(self, model: ModelShape) -> Iterator[str]:
        yield from ()

    def arguments(self, model: ModelShape, layer: int = 0) -> dict[str, Any]:
        """The knobs as constructor arguments, every null resolved; the builder adds the model's (dim, n_heads, ...)."""
        return {f.name: getattr(self, f.name) for f in dc.fields(self) if f.name != "type"}

    def divided(self, model: ModelShape) -> Iterator[Size]:
        """Numbers that ranks must divide where its matrices are cut as registered."""
        yield from ()

    def settled(self, model: ModelShape) -> Self:
        """The same with every null resolved that follows from a size in `divided`."""
        return self

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        return count_parameters(self, model, layer)

    def trace(self, t: Tape, x: Value, place: Place) -> Value:
        """The module's computation on x [B, T, D], in the operations of model/trace/tape.py."""
        raise NotImplementedError

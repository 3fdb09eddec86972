"""What every option of a model axis has."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import Any, NamedTuple, Self, TypeVar, dataclass_transform

from txtrain.model.construct import count_parameters
from txtrain.model.shape import ModelShape
from txtrain.model.trace.attention_ops import Place
from txtrain.model.trace.tape import Tape, Value
from txtrain.registry import knob

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dc.field, knob))
def config(cls: type[T]) -> type[T]:
    return dc.dataclass(frozen=True, kw_only=True)(cls)


class Size(NamedTuple):
    """A number that ranks divide, and the key that sets it. shared: or of which as many ranks share one."""

    key: str
    value: int
    shared: bool = False

    def fits(self, n: int) -> bool:
        return self.value % n == 0 or (self.shared and n % self.value == 0)


@config
class Component:
    """What every option of a model axis has.

    The closed forms of a user's own option are those that its Config states. Without them its parameters are counted on
    the module, built on the meta device, and `plan` says what is missing of FLOPs, cache and memory.
    """

    type: str

    def check(self, model: ModelShape) -> Iterator[str]:
        yield from ()

    def arguments(self, model: ModelShape, layer: int = 0) -> dict[str, Any]:
        """The knobs as constructor arguments. Values of the model (dim, n_heads, ...) are added by the builder where named."""
        return {f.name: getattr(self, f.name) for f in dc.fields(self) if f.name != "type"}

    def divided(self, model: ModelShape) -> Iterator[Size]:
        """What must be divided where ranks share the component's matrices, as its registration cuts them."""
        yield from ()

    def settled(self, model: ModelShape) -> Self:
        """The same with no size left open that follows from one of `divided`."""
        return self

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        return count_parameters(self, model, layer)

    def trace(self, t: Tape, x: Value, place: Place) -> Value:
        """What the module computes of x [B, T, D] at that place of a model, in the operations of model/trace/tape.py."""
        raise NotImplementedError

"""What every option of a model axis has."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import Any, TypeVar, dataclass_transform

from txtrain.model.construct import count_component
from txtrain.model.shape import ModelShape
from txtrain.model.trace.attention_ops import Place
from txtrain.model.trace.tape import NotTraced, Tape, Value
from txtrain.registry import BASES, knob

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dc.field, knob))
def config(cls: type[T]) -> type[T]:
    return dc.dataclass(frozen=True, kw_only=True)(cls)


@config
class Component:
    """What every option of a model axis has. A user's own option derives from this; its counts are then taken from the built module."""

    type: str

    def check(self, model: ModelShape) -> Iterator[str]:
        yield from ()

    def arguments(self, model: ModelShape, layer: int = 0) -> dict[str, Any]:
        """The knobs as constructor arguments. Values of the model (dim, n_heads, ...) are added by the builder where named."""
        return {f.name: getattr(self, f.name) for f in dc.fields(self) if f.name != "type"}

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        """Of an option without a closed form the module is built on the meta device and counted."""
        return count_component(self, model, layer)

    def n_active_params(self, model: ModelShape, layer: int = 0) -> int:
        """Of these, the ones that a token meets: all, unless an option chooses among them."""
        return self.n_params(model, layer)

    def flops(self, model: ModelShape, seq_len: int, layer: int = 0) -> float:
        """Forward floating-point operations a token: a multiply and an add for each parameter, unless an option knows better."""
        return 2.0 * self.n_params(model, layer)

    def trace(self, t: Tape, x: Value, place: Place) -> Value:
        """What the module computes, in the operations of `txtrain.model.trace.tape`: of x [B, T, D] at that place of a model.

        Raises:
            NotTraced: the option does not say. `plan.simulate=true` looks at the module itself.
        """
        raise NotTraced(self.type)


BASES["ffn"] = BASES["norm_position"] = Component

"""What every option of a model axis has."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar, dataclass_transform

from txtrain.registry import BASES, knob

if TYPE_CHECKING:
    from txtrain.model.config import ModelConfig
    from txtrain.planning.memory.attention_ops import Place
    from txtrain.planning.memory.tape import Tape, Value

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
    """What every option of a model axis has. A user's own option derives from this; its counts are then taken from the built module."""

    type: str

    n_experts = 0  # not a field: a mixture has one

    def check(self, model: ModelConfig) -> Iterator[str]:
        yield from ()

    def arguments(self, model: ModelConfig, layer: int = 0) -> dict[str, Any]:
        """The knobs as constructor arguments. Values of the model (dim, n_heads, ...) are added by the builder where named."""
        return {f.name: getattr(self, f.name) for f in dc.fields(self) if f.name != "type"}

    def divided(self, model: ModelConfig) -> Iterator[Size]:
        """What must be divided where ranks share the component's matrices, as its registration cuts them."""
        yield from ()

    def settled(self, model: ModelConfig) -> Self:
        """The same with no size left open that follows from one of `divided`."""
        return self

    def n_params(self, model: ModelConfig, layer: int = 0) -> int:
        from txtrain.model.build import (
            count_component,  # an option without a closed form is built on the meta device and counted
        )

        return count_component(self, model, layer)

    def n_active_params(self, model: ModelConfig, layer: int = 0) -> int:
        """Of these, the ones that a token meets: all, unless an option chooses among them."""
        return self.n_params(model, layer)

    def flops(self, model: ModelConfig, seq_len: int, layer: int = 0) -> float:
        """Forward floating-point operations a token: a multiply and an add for each parameter, unless an option knows better."""
        return 2.0 * self.n_params(model, layer)

    def trace(self, t: Tape, x: Value, place: Place) -> Value:
        """What the module computes, in the operations of `txtrain.planning.memory.tape`: of x [B, T, D] at that place of a model.

        Raises:
            NotTraced: the option does not say. `plan.simulate=true` looks at the module itself.
        """
        from txtrain.planning.memory.tape import NotTraced

        raise NotTraced(self.type)


BASES["ffn"] = BASES["norm_position"] = Component

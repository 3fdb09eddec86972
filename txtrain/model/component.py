"""What every option of a model axis has."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar, dataclass_transform

from txtrain.registry import knob

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
    """What every option of a model axis has.

    The closed forms of a user's own option are those that its Config states. Without them its parameters are counted on
    the module, built on the meta device, and `plan` says what is missing of FLOPs, cache and memory.
    """

    type: str

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
        from txtrain.model.build import count_parameters

        return count_parameters(self, model, layer)

    def trace(self, t: Tape, x: Value, place: Place) -> Value:
        """What the module computes of x [B, T, D] at that place of a model, in the operations of planning/memory/tape.py."""
        raise NotImplementedError

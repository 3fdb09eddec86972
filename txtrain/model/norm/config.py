"""Norm kinds and norm positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from txtrain.model.component import Component, config
from txtrain.model.construct import count_parameters
from txtrain.model.shape import ModelShape
from txtrain.model.trace.attention_ops import Place
from txtrain.model.trace.tape import Tape, Value
from txtrain.registry import BASES, knob, register


@config
class NormBase(Component):
    """What other parts may ask of any norm."""

    def n_params_of(self, model: ModelShape, size: int) -> int:
        """Parameters of the norm over `size` values."""
        return count_parameters(self, model, dim=size)

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        return self.n_params_of(model, model.dim)

    def trace(self, t: Tape, x: Value, place: Place) -> Value:
        return self.trace_of(t, x, place.model.dim)

    def trace_of(self, t: Tape, x: Value, size: int) -> Value:
        """The norm over `size` values each."""
        raise NotImplementedError


@config
class NoNormConfig(NormBase):
    """The identity."""

    def n_params_of(self, model: ModelShape, size: int) -> int:
        return 0

    def trace_of(self, t: Tape, x: Value, size: int) -> Value:
        return x


@config
class LayerNormConfig(NormBase):
    """(x - mean) / sqrt(variance + eps) * weight + bias (1607.06450)."""

    eps: float = knob(1e-5, above=0, carry=True)
    bias: bool = True

    def n_params_of(self, model: ModelShape, size: int) -> int:
        return 2 * size if self.bias else size

    def trace_of(self, t: Tape, x: Value, size: int) -> Value:
        return t.layer_norm(x, size, self.bias)


@config
class RMSNormConfig(NormBase):
    """x / sqrt(mean(x^2) + eps) * weight (1910.07467); with unit_offset, * (1 + weight), as in Gemma."""

    eps: float = knob(1e-5, above=0, carry=True)
    unit_offset: bool = False

    def n_params_of(self, model: ModelShape, size: int) -> int:
        return size

    def trace_of(self, t: Tape, x: Value, size: int) -> Value:
        return t.rms_norm(x, size, self.unit_offset)


@config
class NormPositionBase(Component):
    """Where a sublayer's norm sits; there are no knobs."""

    def joined(self, t: Tape, x: Value, f: Callable[[Value], Value], place: Place) -> Value:
        """The residual stream after the sublayer f, in the operations of `txtrain.model.trace.tape`."""
        raise NotImplementedError


@config
class NormPositionConfig(NormPositionBase):
    n_norms: ClassVar[int] = 1

    def joined(self, t: Tape, x: Value, f: Callable[[Value], Value], place: Place) -> Value:

        def norm(x: Value, name: str) -> Value:
            return t.named(name if self.n_norms > 1 else "norm", place.model.norm.trace, t, x, place)

        before, after = self.type in ("pre", "sandwich"), self.type in ("inner", "sandwich")
        y = f(norm(x, "pre_norm") if before else x)
        y = t.add(x, t.dropout(norm(y, "post_norm") if after else y, place.model.dropout))
        return norm(y, "post_norm") if self.type == "post" else y

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        return self.n_norms * int(model.norm.n_params(model))


@config
class SandwichConfig(NormPositionConfig):
    n_norms: ClassVar[int] = 2


register("norm", "none", "txtrain.model.norm.norms:NoNorm", NoNormConfig)
register("norm", "layer", "txtrain.model.norm.norms:LayerNorm", LayerNormConfig)
register("norm", "rms", "txtrain.model.norm.norms:RMSNorm", RMSNormConfig)
for _name in ("pre", "post", "inner"):
    register("norm_position", _name, f"txtrain.model.norm.placement:{_name.title()}Norm", NormPositionConfig)
register("norm_position", "sandwich", "txtrain.model.norm.placement:SandwichNorm", SandwichConfig)
BASES.update(norm=NormBase, norm_position=NormPositionBase)

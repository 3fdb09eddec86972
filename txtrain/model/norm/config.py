"""Norm kinds and norm positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from txtrain.model.component import Component
from txtrain.model.construct import count_parameters
from txtrain.model.shape import ModelShape
from txtrain.model.trace.attention_ops import Place
from txtrain.model.trace.tape import Tape, Value
from txtrain.registry import BASES, config, knob, register


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

    normalises_stream: ClassVar[bool] = False  # norms the residual stream itself: there is no final norm

    def joined(self, t: Tape, x: Value, f: Callable[[Value], Value], place: Place) -> Value:
        """The residual stream after the sublayer f, in the operations of `txtrain.model.trace.tape`."""
        raise NotImplementedError


@config
class NormPositionConfig(NormPositionBase):
    """By the places of its norms: before the sublayer, after it, or after the sum."""

    norms: ClassVar[tuple[str, ...]] = ("before",)

    def joined(self, t: Tape, x: Value, f: Callable[[Value], Value], place: Place) -> Value:
        names = dict.fromkeys(self.norms, "norm")
        if len(self.norms) > 1:
            names = {"before": "pre_norm", "after": "post_norm"}

        def norm(where: str, x: Value) -> Value:
            return t.named(names[where], place.model.norm.trace, t, x, place) if where in names else x

        y = f(norm("before", x))
        y = t.add(x, t.dropout(norm("after", y), place.model.dropout))
        return norm("sum", y)

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        return len(self.norms) * int(model.norm.n_params(model))


@config
class PostNormConfig(NormPositionConfig):
    normalises_stream: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("sum",)


@config
class InnerNormConfig(NormPositionConfig):
    norms: ClassVar[tuple[str, ...]] = ("after",)


@config
class SandwichConfig(NormPositionConfig):
    norms: ClassVar[tuple[str, ...]] = ("before", "after")


register("norm", "none", "txtrain.model.norm.norms:NoNorm", NoNormConfig)
register("norm", "layer", "txtrain.model.norm.norms:LayerNorm", LayerNormConfig)
register("norm", "rms", "txtrain.model.norm.norms:RMSNorm", RMSNormConfig)
register("norm_position", "pre", "txtrain.model.norm.placement:PreNorm", NormPositionConfig)
register("norm_position", "post", "txtrain.model.norm.placement:PostNorm", PostNormConfig)
register("norm_position", "inner", "txtrain.model.norm.placement:InnerNorm", InnerNormConfig)
register("norm_position", "sandwich", "txtrain.model.norm.placement:SandwichNorm", SandwichConfig)
BASES.update(norm=NormBase, norm_position=NormPositionBase)

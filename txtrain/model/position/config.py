"""Positional schemes, and the ways to stretch rotary ones."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import Any, Literal, cast

from txtrain.model.component import Component, config
from txtrain.model.shape import ModelShape
from txtrain.model.trace.attention_ops import Place
from txtrain.model.trace.tape import Tape, Value
from txtrain.registry import BASES, Cut, knob, register


@config
class PositionBase(Component):
    """What the model's memory is counted from, in the operations of `txtrain.model.trace.tape`.

    restarting: positions begin anew with each document, so that rows differ.
    """

    scaling = cast("RoPEScalingConfig | None", None)  # not a field: rotary positions have one

    def max_positions(self, model: ModelShape) -> int | None:
        """Positions that the scheme tells apart; None: any number."""
        return None

    def trace_sum(self, t: Tape, x: Value, place: Place, restarting: bool) -> Value:
        """The embedding with what is added to it."""
        return x

    def trace_rotation(self, t: Tape, place: Place, restarting: bool) -> tuple[Value, Value] | None:
        """Cosines and sines."""
        return None

    def trace_bias(self, t: Tape, place: Place) -> Value | None:
        """What is added to the scores."""
        return None


@config
class PositionConfig(PositionBase):
    """No position at all (NoPE, 2305.19466): a causal model can still count. Base of the package's others."""

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        return 0


@config
class SinusoidalConfig(PositionConfig):
    """Fixed sines and cosines added to the embedding (1706.03762)."""

    theta: float = knob(10_000.0, above=0)
    # Sines in the even dimensions (the paper), or in the first half (tensor2tensor, Marian).
    layout: Literal["interleaved", "halves"] = "interleaved"

    def check(self, model: ModelShape) -> Iterator[str]:
        if model.dim % 2:
            yield f"`model.dim` must be even with model/position=sinusoidal, but is {model.dim} instead. Nearest: {model.dim - 1}, {model.dim + 1}."

    def trace_sum(self, t: Tape, x: Value, place: Place, restarting: bool) -> Value:
        return t.add(x, t.constant((place.tokens if restarting else place.queries) * place.model.dim))


@config
class LearnedConfig(PositionConfig):
    """One trained vector a position, max_seq_len of them, added to the embedding (BERT, GPT)."""

    def arguments(self, model: ModelShape, layer: int = 0) -> dict[str, Any]:
        return {"grid": model.embedding.grid()}

    def max_positions(self, model: ModelShape) -> int | None:
        return model.max_seq_len

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        return model.max_seq_len * model.dim

    def trace_sum(self, t: Tape, x: Value, place: Place, restarting: bool) -> Value:
        table = t.parameter(place.model.max_seq_len, place.model.dim, name="embedding.weight")
        return t.add(x, t.lookup(table, place.tokens if restarting else place.queries, place.model.dim))


@config
class RoPEScalingConfig:
    """Base of the ways to stretch rotary positions beyond the length of pretraining; `rope_type` is Hugging Face's word."""

    rope_type: str
    factor: float = knob(at_least=1)

    mscale_all_dim = cast("float | None", None)  # not a field: YaRN has one

    def check(self, path: str) -> Iterator[str]:
        yield from ()


@config
class LinearScaling(RoPEScalingConfig):
    """Positions divided by the factor (position interpolation, 2306.15595)."""


@config
class NTKScaling(RoPEScalingConfig):
    """The base raised so that the lowest frequency is stretched by the factor and the highest stays (NTK-aware)."""


@config
class YaRNScaling(RoPEScalingConfig):
    """Interpolated where the wavelength is long, kept where it is short, a ramp between; scores sharpened (2309.00071)."""

    original_max_seq_len: int = knob(at_least=1)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # null: 0.1 ln(factor) + 1, or from mscale / mscale_all_dim where these are given
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # the ramp's ends rounded outwards to whole dimensions


@config
class Llama3Scaling(RoPEScalingConfig):
    """Llama 3.1: wavelengths beyond original / low_freq_factor divided, below original / high_freq_factor kept, blended between."""

    original_max_seq_len: int = knob(at_least=1)
    low_freq_factor: float = knob(1.0, above=0)
    high_freq_factor: float = 4.0

    def check(self, path: str) -> Iterator[str]:
        low, high = self.low_freq_factor, self.high_freq_factor
        if not high > low:
            yield f"`{path}.high_freq_factor` must be above low_freq_factor ({low}), but is {high} instead."


@config
class RoPEConfig(PositionConfig):
    """Rotary embedding of q and k (2104.09864), halves convention."""

    theta: float = knob(10_000.0, above=0)
    scaling: Any = dc.field(default=None, metadata={"axis": "rope_scaling", "tag": "rope_type", "optional": True})

    def arguments(self, model: ModelShape, layer: int = 0) -> dict[str, Any]:
        return {"rotary_dim": model.attention.rotary_dim(model), "theta": self.theta, "scaling": self.scaling}

    def trace_rotation(self, t: Tape, place: Place, restarting: bool) -> tuple[Value, Value] | None:
        n = (place.tokens if restarting else place.queries) * place.model.attention.rotary_dim(place.model) // 2
        return t.constant(n), t.constant(n)

    def check(self, model: ModelShape) -> Iterator[str]:
        if model.attention.rotary_dim(model) % 2:
            name, size = model.attention.rotary_knob, model.attention.rotary_dim(model)
            yield f"`model.attention.{name}` must be even with model/position=rope, but is {size} instead."
        if self.scaling is not None:
            yield from self.scaling.check("model.position.scaling")


@config
class RelativeConfig(PositionConfig):
    """T5's bias on the scores, by buckets of distance, one table shared by all layers (1910.10683)."""

    n_buckets: int = knob(32, at_least=4)
    max_distance: int = 128

    def check(self, model: ModelShape) -> Iterator[str]:
        n, most = self.n_buckets, self.max_distance
        if n % 2:
            yield f"`model.position.n_buckets` must be even, but is {n} instead. Nearest: {n - 1}, {n + 1}."
        elif most <= n // 2:
            yield f"`model.position.max_distance` must be above n_buckets / 2 ({n // 2}), but is {most} instead."

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        return self.n_buckets * model.n_heads

    def trace_bias(self, t: Tape, place: Place) -> Value | None:
        n = place.queries * place.keys
        table = t.kept("table", lambda: t.parameter(self.n_buckets, place.model.n_heads, name="embedding.weight"))
        return t.lookup(table, n, place.model.n_heads, index=8 * n)


@config
class AlibiConfig(PositionConfig):
    """A penalty on the scores that grows with distance, one slope a head (2108.12409)."""

    def trace_bias(self, t: Tape, place: Place) -> Value | None:
        return t.constant(place.model.n_heads * place.queries * place.keys)


register("position", "none", "txtrain.model.position.encodings:Position", PositionConfig)
register("position", "sinusoidal", "txtrain.model.position.encodings:Sinusoidal", SinusoidalConfig)
register("position", "learned", "txtrain.model.position.encodings:Learned", LearnedConfig)
register("position", "rope", "txtrain.model.position.encodings:RoPE", RoPEConfig)
CUT: Cut = {"embedding": "heads"}
register("position", "relative", "txtrain.model.position.encodings:RelativeBias", RelativeConfig, CUT)
register("position", "alibi", "txtrain.model.position.encodings:ALiBi", AlibiConfig)
register("rope_scaling", "linear", "txtrain.model.position.encodings:linear_frequencies", LinearScaling)
register("rope_scaling", "ntk", "txtrain.model.position.encodings:ntk_frequencies", NTKScaling)
register("rope_scaling", "yarn", "txtrain.model.position.encodings:yarn_frequencies", YaRNScaling)
register("rope_scaling", "llama3", "txtrain.model.position.encodings:llama3_frequencies", Llama3Scaling)
BASES["position"] = PositionBase

"""Position schemes, and the scalings of rotary ones."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, cast

from txtrain.model.component import Component
from txtrain.model.shape import ModelShape
from txtrain.model.trace.attention_ops import Place
from txtrain.model.trace.tape import Tape, Value
from txtrain.registry import BASES, Cut, config, knob, register


@config
class PositionBase(Component):
    """What other parts may ask of any position scheme. restarting: at each document, so that rows differ."""

    scaling = cast("RoPEScalingConfig | None", None)  # a field of rotary positions only

    def max_positions(self, model: ModelShape) -> int | None:
        """Number of learned positions; None: unlimited."""
        return None

    def trace_sum(self, t: Tape, x: Value, place: Place, restarting: bool) -> Value:
        """The embedding plus the position's."""
        return x

    def trace_rotation(self, t: Tape, place: Place, restarting: bool) -> tuple[Value, Value] | None:
        """Cosines and sines."""
        return None

    def trace_bias(self, t: Tape, place: Place) -> Value | None:
        """The bias added to the scores."""
        return None


@config
class PositionConfig(PositionBase):
    """No position (NoPE, 2305.19466): a causal mask still reveals the order. Base of the package's other schemes."""

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
            given = f"even with model/position=sinusoidal, but is {model.dim} instead"
            yield f"`model.dim` must be {given}. Nearest: {model.dim - 1}, {model.dim + 1}."

    def trace_sum(self, t: Tape, x: Value, place: Place, restarting: bool) -> Value:
        return t.add(x, t.constant((place.tokens if restarting else place.queries) * place.model.dim))


@config
class LearnedConfig(PositionConfig):
    """A trained vector for each of max_seq_len positions, added to the embedding (BERT, GPT)."""

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
    """Base of the scalings of rotary positions beyond the length of pretraining; `rope_type` is Hugging Face's name."""

    rope_type: str
    factor: float = knob(at_least=1)

    mscale_all_dim = cast("float | None", None)  # a field of YaRN only
    by_length: ClassVar[bool] = False  # frequencies depend on the length that is read (`encodings.stretched`)

    def resolved(self, theta: float, rotary_dim: int) -> tuple[float, RoPEScalingConfig | None]:
        """The base and the scaling that give the same angles, where another base alone does."""
        return theta, self

    def check(self, path: str) -> Iterator[str]:
        yield from ()

    def theta_above(self) -> float:
        """Its formula is defined for larger bases. A method: exported folders hold its attributes."""
        return 0.0


@config
class LinearScaling(RoPEScalingConfig):
    """Positions divided by the factor (position interpolation, 2306.15595)."""


@config
class NTKScaling(RoPEScalingConfig):
    """A higher base: the lowest frequency is divided by the factor, the highest stays (NTK-aware)."""

    def resolved(self, theta: float, rotary_dim: int) -> tuple[float, RoPEScalingConfig | None]:
        return theta * self.factor ** (rotary_dim / max(rotary_dim - 2, 1)), None


@config
class DynamicScaling(RoPEScalingConfig):
    """NTK-aware by length: unscaled up to model.max_seq_len, beyond it a base that grows with a row's tokens.

    Of packed documents the longest in the row counts (transformers: the longest row of the batch, padding included). As
    in transformers, keys in a cache keep the rotation of the step that wrote them.
    """

    by_length: ClassVar[bool] = True


@config
class YaRNScaling(RoPEScalingConfig):
    """Long wavelengths interpolated, short ones kept, a ramp between; scores multiplied by mscale^2 (2309.00071)."""

    original_max_position_embeddings: int = knob(at_least=1, was="original_max_seq_len")
    beta_fast: float = knob(32.0, above=0)
    beta_slow: float = knob(1.0, above=0)
    attention_factor: float | None = None  # null: 0.1 ln(factor) + 1, or from mscale and mscale_all_dim if given
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # the ramp's ends rounded outwards to whole dimensions

    def theta_above(self) -> float:
        return 1.0  # the ramp's ends are logarithms to that base


@config
class Llama3Scaling(RoPEScalingConfig):
    """Llama 3.1: wavelengths above original / low_freq_factor divided, below original / high_freq_factor kept."""

    original_max_position_embeddings: int = knob(at_least=1, was="original_max_seq_len")
    low_freq_factor: float = knob(1.0, above=0)
    high_freq_factor: float = 4.0

    def check(self, path: str) -> Iterator[str]:
        if not (high := self.high_freq_factor) > (low := self.low_freq_factor):
            yield f"`{path}.high_freq_factor` must be above low_freq_factor ({low}), but is {high} instead."


@config
class RoPEConfig(PositionConfig):
    """Rotary embedding of q and k (2104.09864), halves convention."""

    theta: float = knob(10_000.0, above=0)
    scaling: Any = dc.field(default=None, metadata={"axis": "rope_scaling", "tag": "rope_type", "optional": True})

    def arguments(self, model: ModelShape, layer: int = 0) -> dict[str, Any]:
        size = model.attention.rotary_dim(model)
        theta, scaling = (self.theta, None) if self.scaling is None else self.scaling.resolved(self.theta, size)
        return {"rotary_dim": size, "theta": theta, "scaling": scaling}

    def trace_rotation(self, t: Tape, place: Place, restarting: bool) -> tuple[Value, Value] | None:
        n = (place.tokens if restarting else place.queries) * place.model.attention.rotary_dim(place.model) // 2
        return t.constant(n), t.constant(n)

    def check(self, model: ModelShape) -> Iterator[str]:
        if (size := model.attention.rotary_dim(model)) % 2:
            name = model.attention.rotary_knob
            yield f"`model.attention.{name}` must be even with model/position=rope, but is {size} instead."
        if self.scaling is not None:
            if self.theta <= (least := self.scaling.theta_above()):
                what = f"above {least:g} with model.position.scaling.rope_type={self.scaling.rope_type}"
                yield f"`model.position.theta` must be {what}, but is {self.theta:g} instead."
            yield from self.scaling.check("model.position.scaling")


@config
class RelativeConfig(PositionConfig):
    """T5's bias on the scores by buckets of distance, one table for all layers (1910.10683)."""

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
    """A penalty on the scores that grows with distance, one slope per head (2108.12409)."""

    def trace_bias(self, t: Tape, place: Place) -> Value | None:
        return t.constant(place.model.n_heads * place.queries * place.keys)


register("position", "none", "txtrain.model.position.encodings:Position", PositionConfig)
register("position", "sinusoidal", "txtrain.model.position.encodings:Sinusoidal", SinusoidalConfig)
register("position", "learned", "txtrain.model.position.encodings:Learned", LearnedConfig)
register("position", "rope", "txtrain.model.position.encodings:RoPE", RoPEConfig)
CUT: Cut = {"embedding": "heads"}
register("position", "relative", "txtrain.model.position.encodings:RelativeBias", RelativeConfig, CUT)
register("position", "alibi", "txtrain.model.position.encodings:ALiBi", AlibiConfig)
for _type, _function, _cls in (
    ("linear", "linear", LinearScaling), ("ntk", "unscaled", NTKScaling), ("dynamic", "unscaled", DynamicScaling),
    ("yarn", "yarn", YaRNScaling), ("llama3", "llama3", Llama3Scaling),
):
    register("rope_scaling", _type, f"txtrain.model.position.encodings:{_function}_frequencies", _cls)
BASES["position"] = PositionBase

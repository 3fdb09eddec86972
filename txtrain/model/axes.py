"""The options of the model's axes: their knobs, what is legal, and what they cost in closed form. No torch.

A config names the knobs of one option. `arguments` resolves the ones left open (null) and gives the flat parameters of the class
that is built; `check` yields what is illegal; `n_params` and `flops` count. The classes stand in the modules beside this one:
attention.py, ffn.py, position.py, norm.py, embedding.py, residual.py.
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, dataclass_transform

from txtrain.errors import divisors_near
from txtrain.registry import BASES, knob, register

if TYPE_CHECKING:
    from txtrain.model.config import ModelConfig

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "relu2", "tanh"]


T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dc.field, knob))
def config(cls: type[T]) -> type[T]:
    return dc.dataclass(frozen=True, kw_only=True)(cls)


@config
class Component:
    """What every option of a model axis has. A user's own option derives from this; its counts are then taken from the built module."""

    type: str

    def check(self, model: ModelConfig) -> Iterator[str]:
        yield from ()

    def arguments(self, model: ModelConfig, layer: int = 0) -> dict[str, Any]:
        """The knobs as constructor arguments. Values of the model (dim, n_heads, ...) are added by the builder where named."""
        return {f.name: getattr(self, f.name) for f in dc.fields(self) if f.name != "type"}

    def n_params(self, model: ModelConfig, layer: int = 0) -> int:
        from txtrain.model.build import count_component  # an option without a closed form is built on the meta device and counted

        return count_component(self, model, layer)

    def flops(self, model: ModelConfig, seq_len: int, layer: int = 0) -> float:
        """Forward floating-point operations a token: a multiply and an add for each parameter, unless an option knows better."""
        return 2.0 * self.n_params(model, layer)


# --------------------------------------------------------------------------------------------------------------- attention


@config
class AttentionBase(Component):
    """What the other axes may ask of any attention."""

    def rotary_dim(self, model: ModelConfig) -> int:
        """The size of the part of a head that position turns."""
        return model.dim // model.n_heads


@config
class AttentionConfig(AttentionBase):
    """Multi-head attention. n_kv_heads tells the three kinds apart: all heads (mha), some (gqa, 2305.13245), one (mqa, 1911.02150)."""

    n_kv_heads: int | None = None  # null: n_heads
    head_dim: int | None = knob(None, carry=True)  # null: dim / n_heads
    window: int | tuple[int | None, ...] | None = None  # position i sees j with 0 <= i - j < window; a list is repeated over the layers
    softcap: float | None = None  # softcap * tanh(score / softcap)
    scale: float | None = None  # null: head_dim ** -0.5
    qk_norm: bool = False  # the model's norm over each head of q and k
    bias: bool = knob(False, carry=True)
    dropout: float | None = knob(None, carry=True)  # of the probabilities; null: model.dropout

    def heads(self, model: ModelConfig) -> tuple[int, int, int]:
        """n_heads, n_kv_heads, head_dim, with nothing left open."""
        return model.n_heads, self.n_kv_heads or model.n_heads, self.head_dim or model.dim // model.n_heads

    def rotary_dim(self, model: ModelConfig) -> int:
        return self.heads(model)[2]

    def window_at(self, layer: int) -> int | None:
        return self.window[layer % len(self.window)] if isinstance(self.window, tuple) else self.window

    def check(self, model: ModelConfig) -> Iterator[str]:
        n, path = model.n_heads, "model.attention"
        if self.head_dim is None and model.dim % n:
            near = ", ".join(map(str, divisors_near(n, model.dim)))
            yield f"`model.n_heads` must divide model.dim ({model.dim}) unless {path}.head_dim is set, but is {n} instead. Nearest: {near}."
        kv = self.n_kv_heads
        if kv is not None and (kv < 1 or n % kv):
            near = ", ".join(map(str, divisors_near(kv, n)))
            yield f"`{path}.n_kv_heads` must divide model.n_heads ({n}), but is {kv} instead. Nearest: {near}."
        elif self.type == "mha" and kv not in (None, n):
            yield f"`{path}.n_kv_heads` must be null or model.n_heads ({n}) with model/attention=mha, but is {kv} instead: write model/attention=gqa."
        elif self.type == "mqa" and kv != 1:
            yield f"`{path}.n_kv_heads` must be 1 with model/attention=mqa, but is {kv} instead: write model/attention=gqa."
        if self.head_dim is not None and self.head_dim < 1:
            yield f"`{path}.head_dim` must be null or at least 1, but is {self.head_dim} instead."
        if isinstance(self.window, tuple) and not self.window:
            yield f"`{path}.window` must be a width, null, or a list of them with one entry or more, but is [] instead."
        for w in self.window if isinstance(self.window, tuple) else (self.window,):
            if w is not None and w < 1:
                yield f"`{path}.window` must be at least 1 or null, but is {w} instead."
        for name in ("softcap", "scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                yield f"`{path}.{name}` must be above 0 or null, but is {value} instead."
        if self.dropout is not None and not 0 <= self.dropout < 1:
            yield f"`{path}.dropout` must be at least 0 and below 1, but is {self.dropout} instead."

    def arguments(self, model: ModelConfig, layer: int = 0) -> dict[str, Any]:
        n_heads, n_kv_heads, head_dim = self.heads(model)
        return {
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "head_dim": head_dim,
            "window": self.window_at(layer),
            "softcap": self.softcap,
            "scale": head_dim**-0.5 if self.scale is None else self.scale,
            "qk_norm": self.qk_norm,
            "bias": self.bias,
            "attention_dropout": model.dropout if self.dropout is None else self.dropout,
        }

    def _weights(self, model: ModelConfig) -> int:
        n, kv, h = self.heads(model)
        return 2 * model.dim * h * (n + kv)

    def n_params(self, model: ModelConfig, layer: int = 0) -> int:
        n, kv, h = self.heads(model)
        bias = (h * (n + 2 * kv) + model.dim) if self.bias else 0
        return self._weights(model) + bias + (2 * model.norm.n_params_of(h) if self.qk_norm else 0)

    def flops(self, model: ModelConfig, seq_len: int, layer: int = 0) -> float:
        n, _, h = self.heads(model)
        seen = min(seq_len, self.window_at(layer) or seq_len)  # causal attention is counted in full, as in PaLM's appendix B
        return 2.0 * self._weights(model) + 4.0 * n * h * seen


# --------------------------------------------------------------------------------------------------------------------- ffn


@config
class MLPConfig(Component):
    """down(act(up(x))), as in the 2017 paper."""

    hidden_dim: int | None = None  # null: 4 * dim
    activation: Activation = "gelu_tanh"
    bias: bool = knob(True, carry=True)
    dropout: float = knob(0.0, carry=True)  # between activation and down projection

    n_matrices: ClassVar[int] = 2

    def width(self, model: ModelConfig) -> int:
        return self.hidden_dim or 4 * model.dim

    def check(self, model: ModelConfig) -> Iterator[str]:
        if self.hidden_dim is not None and self.hidden_dim < 1:
            yield f"`model.ffn.hidden_dim` must be null or at least 1, but is {self.hidden_dim} instead."
        if not 0 <= self.dropout < 1:
            yield f"`model.ffn.dropout` must be at least 0 and below 1, but is {self.dropout} instead."

    def arguments(self, model: ModelConfig, layer: int = 0) -> dict[str, Any]:
        return {"hidden_dim": self.width(model), "activation": self.activation, "bias": self.bias, "ffn_dropout": self.dropout}

    def n_params(self, model: ModelConfig, layer: int = 0) -> int:
        f = self.width(model)
        return self.n_matrices * model.dim * f + (((self.n_matrices - 1) * f + model.dim) if self.bias else 0)

    def flops(self, model: ModelConfig, seq_len: int, layer: int = 0) -> float:
        return 2.0 * self.n_matrices * model.dim * self.width(model)


@config
class GatedConfig(MLPConfig):
    """down(act(gate(x)) * up(x)): GLU variants (2002.05202)."""

    hidden_dim: int | None = knob(None, carry=True)  # null: 8/3 * dim, up to a multiple of 8, so that a swap keeps the parameters
    activation: Activation = "silu"
    bias: bool = knob(False, carry=True)

    n_matrices: ClassVar[int] = 3

    def width(self, model: ModelConfig) -> int:
        return self.hidden_dim or math.ceil(model.dim / 3) * 8


# ---------------------------------------------------------------------------------------------------------------- position


@config
class PositionConfig(Component):
    """No position at all (NoPE, 2305.19466): a causal model can still count. Base of the others."""

    def n_params(self, model: ModelConfig, layer: int = 0) -> int:
        return 0

    def flops(self, model: ModelConfig, seq_len: int, layer: int = 0) -> float:
        return 0.0


@config
class SinusoidalConfig(PositionConfig):
    """Fixed sines and cosines added to the embedding (1706.03762)."""

    theta: float = 10_000.0

    def check(self, model: ModelConfig) -> Iterator[str]:
        if model.dim % 2:
            yield f"`model.dim` must be even with model/position=sinusoidal, but is {model.dim} instead. Nearest: {model.dim - 1}, {model.dim + 1}."


@config
class LearnedConfig(PositionConfig):
    """One trained vector a position, max_seq_len of them, added to the embedding (BERT, GPT)."""

    def n_params(self, model: ModelConfig, layer: int = 0) -> int:
        return model.max_seq_len * model.dim


@config
class RoPEScalingConfig:
    """Base of the ways to stretch rotary positions beyond the length of pretraining; `rope_type` is Hugging Face's word."""

    rope_type: str
    factor: float

    def check(self, path: str) -> Iterator[str]:
        if not self.factor >= 1:
            yield f"`{path}.factor` must be at least 1, but is {self.factor} instead."


@config
class LinearScaling(RoPEScalingConfig):
    """Positions divided by the factor (position interpolation, 2306.15595)."""


@config
class NTKScaling(RoPEScalingConfig):
    """The base raised so that the lowest frequency is stretched by the factor and the highest stays (NTK-aware)."""


@config
class YaRNScaling(RoPEScalingConfig):
    """Interpolated where the wavelength is long, kept where it is short, a ramp between; scores sharpened (2309.00071)."""

    original_max_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # null: 0.1 ln(factor) + 1, or from mscale / mscale_all_dim where these are given
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # the ramp's ends rounded outwards to whole dimensions


@config
class Llama3Scaling(RoPEScalingConfig):
    """Llama 3.1: wavelengths beyond original / low_freq_factor divided, below original / high_freq_factor kept, blended between."""

    original_max_seq_len: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def check(self, path: str) -> Iterator[str]:
        yield from RoPEScalingConfig.check(self, path)
        if not self.high_freq_factor > self.low_freq_factor:
            yield f"`{path}.high_freq_factor` must be above low_freq_factor ({self.low_freq_factor}), but is {self.high_freq_factor} instead."


@config
class RoPEConfig(PositionConfig):
    """Rotary embedding of q and k (2104.09864), halves convention."""

    theta: float = 10_000.0
    scaling: Any = dc.field(default=None, metadata={"axis": "rope_scaling", "tag": "rope_type", "optional": True})

    def arguments(self, model: ModelConfig, layer: int = 0) -> dict[str, Any]:
        return {"rotary_dim": model.attention.rotary_dim(model), "theta": self.theta, "scaling": self.scaling}

    def check(self, model: ModelConfig) -> Iterator[str]:
        if model.attention.rotary_dim(model) % 2:
            yield f"`model.attention.head_dim` must be even with model/position=rope, but is {model.attention.rotary_dim(model)} instead."
        if not self.theta > 0:
            yield f"`model.position.theta` must be above 0, but is {self.theta} instead."
        if self.scaling is not None:
            yield from self.scaling.check("model.position.scaling")


@config
class RelativeConfig(PositionConfig):
    """T5's bias on the scores, by buckets of distance, one table shared by all layers (1910.10683)."""

    n_buckets: int = 32
    max_distance: int = 128

    def check(self, model: ModelConfig) -> Iterator[str]:
        if self.n_buckets < 4 or self.n_buckets % 2:
            yield f"`model.position.n_buckets` must be even and at least 4, but is {self.n_buckets} instead."
        elif self.max_distance <= self.n_buckets // 2:
            yield f"`model.position.max_distance` must be above n_buckets / 2 ({self.n_buckets // 2}), but is {self.max_distance} instead."

    def n_params(self, model: ModelConfig, layer: int = 0) -> int:
        return self.n_buckets * model.n_heads


@config
class AlibiConfig(PositionConfig):
    """A penalty on the scores that grows with distance, one slope a head (2108.12409)."""


# -------------------------------------------------------------------------------------------------------------------- norm


@config
class NoNormConfig(Component):
    def n_params_of(self, size: int) -> int:
        return 0

    def n_params(self, model: ModelConfig, layer: int = 0) -> int:
        return self.n_params_of(model.dim)

    def flops(self, model: ModelConfig, seq_len: int, layer: int = 0) -> float:
        return 0.0


@config
class LayerNormConfig(NoNormConfig):
    """(x - mean) / sqrt(variance + eps) * weight + bias (1607.06450)."""

    eps: float = knob(1e-5, carry=True)
    bias: bool = True

    def check(self, model: ModelConfig) -> Iterator[str]:
        if not self.eps > 0:
            yield f"`model.norm.eps` must be above 0, but is {self.eps} instead."

    def n_params_of(self, size: int) -> int:
        return 2 * size if self.bias else size


@config
class RMSNormConfig(NoNormConfig):
    """x / sqrt(mean(x^2) + eps) * weight (1910.07467); with unit_offset, * (1 + weight), as in Gemma."""

    eps: float = knob(1e-5, carry=True)
    unit_offset: bool = False

    def check(self, model: ModelConfig) -> Iterator[str]:
        if not self.eps > 0:
            yield f"`model.norm.eps` must be above 0, but is {self.eps} instead."

    def n_params_of(self, size: int) -> int:
        return size


# --------------------------------------------------------------------------------------------- embedding and norm position


@config
class TokenEmbeddingConfig(Component):
    """One vector a token. scale: times sqrt(dim), the factor rounded to the weights' dtype (2017, Gemma)."""

    scale: bool = False

    def n_params(self, model: ModelConfig, layer: int = 0) -> int:
        return model.vocab_size * model.dim

    def flops(self, model: ModelConfig, seq_len: int, layer: int = 0) -> float:
        return 0.0


@config
class NormPositionConfig(Component):
    """Where a sublayer's norm sits. No knobs: the option's name is all there is."""

    n_norms: ClassVar[int] = 1

    def n_params(self, model: ModelConfig, layer: int = 0) -> int:
        return self.n_norms * model.norm.n_params_of(model.dim)


@config
class SandwichConfig(NormPositionConfig):
    n_norms: ClassVar[int] = 2


register("attention", "mha gqa mqa", "txtrain.model.attention:MultiHeadAttention", AttentionConfig)
register("ffn", "mlp", "txtrain.model.ffn:MLP", MLPConfig)
register("ffn", "swiglu geglu", "txtrain.model.ffn:GatedFFN", GatedConfig)
register("position", "none", "txtrain.model.position:Position", PositionConfig)
register("position", "sinusoidal", "txtrain.model.position:Sinusoidal", SinusoidalConfig)
register("position", "learned", "txtrain.model.position:Learned", LearnedConfig)
register("position", "rope", "txtrain.model.position:RoPE", RoPEConfig)
register("position", "relative", "txtrain.model.position:RelativeBias", RelativeConfig)
register("position", "alibi", "txtrain.model.position:ALiBi", AlibiConfig)
register("rope_scaling", "linear", "txtrain.model.position:linear_frequencies", LinearScaling)
register("rope_scaling", "ntk", "txtrain.model.position:ntk_frequencies", NTKScaling)
register("rope_scaling", "yarn", "txtrain.model.position:yarn_frequencies", YaRNScaling)
register("rope_scaling", "llama3", "txtrain.model.position:llama3_frequencies", Llama3Scaling)
register("norm", "none", "txtrain.model.norm:NoNorm", NoNormConfig)
register("norm", "layer", "txtrain.model.norm:LayerNorm", LayerNormConfig)
register("norm", "rms", "txtrain.model.norm:RMSNorm", RMSNormConfig)
register("norm_position", "pre", "txtrain.model.residual:PreNorm", NormPositionConfig)
register("norm_position", "post", "txtrain.model.residual:PostNorm", NormPositionConfig)
register("norm_position", "inner", "txtrain.model.residual:InnerNorm", NormPositionConfig)
register("norm_position", "sandwich", "txtrain.model.residual:SandwichNorm", SandwichConfig)
register("embedding", "token", "txtrain.model.embedding:TokenEmbedding", TokenEmbeddingConfig)

BASES.update(
    attention=AttentionBase,
    ffn=Component,
    position=PositionConfig,
    norm=Component,
    norm_position=Component,
)
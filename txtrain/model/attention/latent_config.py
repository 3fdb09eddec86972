"""Latent attention's option."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Self

from txtrain.model.attention.multi_head_config import AttentionBase
from txtrain.model.component import Size
from txtrain.model.shape import ModelShape
from txtrain.model.trace.attention_ops import Place, attend, rotated
from txtrain.model.trace.tape import Tape, Value
from txtrain.registry import Cut, config, dropout_knob, knob, register


class Sizes(NamedTuple):
    """The knobs with every null resolved."""

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim


@config
class MLAConfig(AttentionBase):
    """Multi-head latent attention (DeepSeek-V2, 2405.04434): all heads' keys and values come from one small vector."""

    q_rank: int | None = knob(None, at_least=1)  # size of the queries' latent; null: they come from the stream itself
    kv_rank: int | None = knob(None, at_least=1)  # size of the keys' and values' latent; null: 4 h, h = dim / n_heads
    nope_dim: int | None = knob(None, at_least=1)  # unrotated part of a head of q and k; null: h
    rope_dim: int | None = knob(None, at_least=1)  # rotated part, whose key all heads share; null: h / 2
    v_dim: int | None = knob(None, at_least=1)  # head size of the values; null: h
    # null: (nope_dim + rope_dim) ** -0.5, times mscale^2 where YaRN has mscale_all_dim.
    scale: float | None = knob(None, above=0)
    bias: bool = knob(False, carry=True)  # of the projections to the latents, and of the output
    dropout: float | None = dropout_knob(None)  # of the probabilities; null: model.dropout

    rotary_knob: ClassVar[str] = "rope_dim"

    def sizes(self, model: ModelShape) -> Sizes:
        h = model.dim // model.n_heads
        rope_dim = self.rope_dim or max(2, h // 4 * 2)
        return Sizes(self.q_rank, self.kv_rank or 4 * h, self.nope_dim or h, rope_dim, self.v_dim or h)

    def divided(self, model: ModelShape) -> Iterator[Size]:
        yield Size("model.n_heads", model.n_heads)

    def settled(self, model: ModelShape) -> Self:
        return dc.replace(self, **self.sizes(model)._asdict())

    def rotary_dim(self, model: ModelShape) -> int:
        return self.sizes(model).rope_dim

    def check(self, model: ModelShape) -> Iterator[str]:
        if model.dim < model.n_heads and None in (self.kv_rank, self.nope_dim, self.v_dim):
            most = f"at most model.dim ({model.dim}) unless model.attention.kv_rank, nope_dim and v_dim are set"
            yield f"`model.n_heads` must be {most}, but is {model.n_heads} instead."

    def arguments(self, model: ModelShape, layer: int = 0) -> dict[str, Any]:
        sizes = self.sizes(model)
        scale = sizes.qk_dim**-0.5 * _yarn_factor(model) if self.scale is None else self.scale
        own = {"n_heads": model.n_heads, "scale": scale, "bias": self.bias, "attention_dropout": self.dropped(model)}
        return {**sizes._asdict(), **own}

    def _weights(self, model: ModelShape) -> tuple[int, int]:
        """Weights that a token passes as a query, and as a key."""
        s, n, d = self.sizes(model), model.n_heads, model.dim
        queries = d * n * s.qk_dim if s.q_rank is None else (d + n * s.qk_dim) * s.q_rank
        return queries + n * s.v_dim * d, d * (s.kv_rank + s.rope_dim) + s.kv_rank * n * (s.nope_dim + s.v_dim)

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        s = self.sizes(model)
        norms = sum(model.norm.n_params_of(model, rank) for rank in (s.kv_rank, s.q_rank) if rank)
        bias = (s.q_rank or 0) + s.kv_rank + s.rope_dim + model.dim if self.bias else 0
        return sum(self._weights(model)) + int(norms) + bias

    def projection_flops(self, model: ModelShape, layer: int = 0) -> tuple[float, float]:
        """In the expanded form, which training uses."""
        of_query, of_key = self._weights(model)
        return 2.0 * of_query, 2.0 * of_key

    def score_flops(self, model: ModelShape, layer: int = 0) -> float:
        s = self.sizes(model)
        return 2.0 * model.n_heads * (s.qk_dim + s.v_dim)

    def cache_values(self, model: ModelShape, layer: int = 0) -> int:
        s = self.sizes(model)
        return s.kv_rank + s.rope_dim

    def trace(self, t: Tape, x: Value, place: Place) -> Value:
        """In the expanded form, which training uses."""
        model, s, turn = place.model, self.sizes(place.model), place.rotation
        n, keys, norm = model.n_heads, place.batch * place.keys, model.norm.trace_of
        q = x
        if s.q_rank is not None:
            q = t.linear(x, model.dim, s.q_rank, self.bias, name="q_down_proj")
            q = t.named("q_norm", norm, t, q, s.q_rank)
        q = t.back_copied(t.linear(q, s.q_rank or model.dim, n * s.qk_dim, name="q_proj"))
        q_plain, q_turned = t.split(q, place.tokens * n * s.nope_dim, place.tokens * n * s.rope_dim)
        q_turned = rotated(t, q_turned, turn, several=False)
        source = x if place.memory is None else place.memory
        latent = t.linear(source, model.dim, s.kv_rank, self.bias, name="kv_down_proj")
        latent = t.named("kv_norm", norm, t, latent, s.kv_rank)
        k_turned = t.linear(source, model.dim, s.rope_dim, self.bias, name="k_rope_proj")
        k_turned = rotated(t, k_turned, turn, several=False)
        k_plain = t.back_copied(t.linear(latent, s.kv_rank, n * s.nope_dim, name="k_proj"))
        v = t.linear(latent, s.kv_rank, n * s.v_dim, name="v_proj")
        k = t.cat(k_plain, t.expanded(k_turned, keys * n * s.rope_dim))
        dropout, same_size = self.dropped(model), s.qk_dim == s.v_dim
        y = attend(t, t.cat(q_plain, q_turned), k, v, place, (n, n), False, dropout, same_size)
        return t.linear(y, n * s.v_dim, model.dim, self.bias, name="o_proj")


def _yarn_factor(model: ModelShape) -> float:
    """YaRN multiplies scores by mscale^2 through cos and sin. Those reach only the rotated part of a latent head, but
    mscale_all_dim is meant for all of it."""
    scaling = model.position.scaling
    if scaling is None or not scaling.mscale_all_dim or scaling.factor <= 1:
        return 1.0
    mscale: float = 0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1.0
    return mscale**2


CUT: Cut = {"q_proj": "rows", "k_proj": "rows", "v_proj": "rows", "o_proj": "columns"}
register("attention", "mla", "txtrain.model.attention.latent:LatentAttention", MLAConfig, CUT)

"""The options mha, gqa and mqa of attention, and the base of all."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import Any, ClassVar, Self, cast

from txtrain.model.component import Component, Size, must_divide
from txtrain.model.shape import ModelShape
from txtrain.model.trace.attention_ops import Place, attend, rotated
from txtrain.model.trace.tape import Tape, Value
from txtrain.registry import BASES, Cut, config, dropout_knob, knob, register


@config
class AttentionBase(Component):
    """What other parts may ask of any attention."""

    rotary_knob: ClassVar[str] = "head_dim"  # the knob that sets rotary_dim
    softcap = cast("float | None", None)  # this and dropout are fields of some options only
    dropout = cast("float | None", None)

    def rotary_dim(self, model: ModelShape) -> int:
        """Size of the rotated part of a head."""
        return model.dim // model.n_heads

    def dropped(self, model: ModelShape) -> float:
        """Dropout of the probabilities."""
        return model.dropout if self.dropout is None else self.dropout

    def window_at(self, layer: int) -> int | None:
        """The window of that layer; None: no window."""
        return None

    def projection_flops(self, model: ModelShape, layer: int = 0) -> tuple[float, float]:
        """Forward FLOPs of one token as a query (with the output), and as a key and value."""
        return self.n_params(model, layer), self.n_params(model, layer)

    def score_flops(self, model: ModelShape, layer: int = 0) -> float:
        """Forward FLOPs of one query and one key: the score, and the weighted sum. 0: unknown."""
        return 0.0

    def cache_values(self, model: ModelShape, layer: int = 0) -> int:
        """Numbers that the cache keeps per token; by default keys and values of all heads."""
        return 2 * model.dim

    def flops(self, model: ModelShape, seq_len: int, layer: int = 0) -> float:
        """Forward FLOPs per token of self-attention, less what a window hides (`txtrain.model.flops`: useful)."""
        seen = self.seen(seq_len, layer, causal=model.topology != "encoder")
        return sum(self.projection_flops(model, layer)) + self.score_flops(model, layer) * seen

    def seen(self, seq_len: int, layer: int, *, causal: bool) -> int:
        """Keys within a query's window, which reaches to one side if causal, else to both."""
        window = self.window_at(layer)
        return seq_len if window is None else min(seq_len, window if causal else 2 * window - 1)


@config
class AttentionConfig(AttentionBase):
    """Multi-head attention. n_kv_heads: all heads (mha), some (gqa, 2305.13245), or one (mqa, 1911.02150)."""

    n_kv_heads: int | None = None  # null: n_heads
    head_dim: int | None = knob(None, at_least=1, carry=True)  # null: dim / n_heads
    # Position i sees j with 0 <= i - j < window; a list is repeated over the layers.
    window: int | tuple[int | None, ...] | None = knob(None, at_least=1)
    softcap: float | None = knob(None, above=0)  # softcap * tanh(score / softcap)
    scale: float | None = knob(None, above=0)  # null: head_dim ** -0.5
    qk_norm: bool = False  # the model's norm over each head of q and k
    bias: bool = knob(False, carry=True)
    dropout: float | None = dropout_knob(None)  # of the probabilities; null: model.dropout

    def heads(self, model: ModelShape) -> tuple[int, int, int]:
        """n_heads, n_kv_heads, head_dim, every null resolved."""
        return model.n_heads, self.n_kv_heads or model.n_heads, self.head_dim or model.dim // model.n_heads

    def divided(self, model: ModelShape) -> Iterator[Size]:
        n, kv, _ = self.heads(model)
        yield Size("model.n_heads", n)
        if kv != n:
            yield Size("model.attention.n_kv_heads", kv, shared=True)

    def settled(self, model: ModelShape) -> Self:
        n, kv, h = self.heads(model)
        return dc.replace(self, n_kv_heads=None if kv == n else kv, head_dim=h)

    def rotary_dim(self, model: ModelShape) -> int:
        return self.heads(model)[2]

    def window_at(self, layer: int) -> int | None:
        return self.window[layer % len(self.window)] if isinstance(self.window, tuple) else self.window

    def check(self, model: ModelShape) -> Iterator[str]:
        n, kv, path = model.n_heads, self.n_kv_heads, "model.attention"
        if self.head_dim is None and model.dim % n:
            yield must_divide("model.n_heads", n, "model.dim", model.dim, f" unless {path}.head_dim is set")
        if kv is not None and (kv < 1 or n % kv):
            yield must_divide(f"{path}.n_kv_heads", kv, "model.n_heads", n)
        elif (self.type == "mha" and kv not in (None, n)) or (self.type == "mqa" and kv != 1):
            allowed = "1" if self.type == "mqa" else f"null or model.n_heads ({n})"
            given = f"{allowed} with model/attention={self.type}, but is {kv} instead"
            yield f"`{path}.n_kv_heads` must be {given}: write model/attention=gqa."
        if self.window == ():
            yield f"`{path}.window` must be a width, null, or a list of at least one of them, but is [] instead."

    def arguments(self, model: ModelShape, layer: int = 0) -> dict[str, Any]:
        n_heads, n_kv_heads, head_dim = self.heads(model)
        return {
            "n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim, "window": self.window_at(layer),
            "scale": head_dim**-0.5 if self.scale is None else self.scale, "softcap": self.softcap,
            "qk_norm": self.qk_norm, "bias": self.bias, "attention_dropout": self.dropped(model),
        }

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        n, kv, h = self.heads(model)
        bias = (h * (n + 2 * kv) + model.dim) if self.bias else 0
        return 2 * model.dim * h * (n + kv) + bias + (2 * model.norm.n_params_of(model, h) if self.qk_norm else 0)

    def projection_flops(self, model: ModelShape, layer: int = 0) -> tuple[float, float]:
        n, kv, h = self.heads(model)
        return 4.0 * model.dim * h * n, 4.0 * model.dim * h * kv

    def score_flops(self, model: ModelShape, layer: int = 0) -> float:
        return 4.0 * model.n_heads * self.heads(model)[2]

    def cache_values(self, model: ModelShape, layer: int = 0) -> int:
        _, kv, h = self.heads(model)
        return 2 * kv * h

    def trace(self, t: Tape, x: Value, place: Place) -> Value:
        model, norm = place.model, place.model.norm
        n, kv, h = self.heads(model)
        q = t.linear(x, model.dim, n * h, self.bias, name="q_proj")
        q = rotated(t, t.named("q_norm", norm.trace_of, t, q, h) if self.qk_norm else q, place.rotation, n > 1)
        source = x if place.memory is None else place.memory
        k = t.linear(source, model.dim, kv * h, self.bias, name="k_proj")
        k = rotated(t, t.named("k_norm", norm.trace_of, t, k, h) if self.qk_norm else k, place.rotation, kv > 1)
        v = t.linear(source, model.dim, kv * h, self.bias, name="v_proj")
        y = attend(t, q, k, v, place, (n, kv), self.softcap is not None, self.dropped(model), same_size=True)
        return t.linear(y, n * h, model.dim, self.bias, name="o_proj")


CUT: Cut = {"q_proj": "rows", "k_proj": "shared_rows", "v_proj": "shared_rows", "o_proj": "columns"}
register("attention", "mha gqa mqa", "txtrain.model.attention.multi_head:MultiHeadAttention", AttentionConfig, CUT)
BASES["attention"] = AttentionBase

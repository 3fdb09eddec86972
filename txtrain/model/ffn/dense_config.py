"""Feed-forward's options."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from txtrain.model.component import Component, config
from txtrain.model.shape import ModelShape
from txtrain.model.trace.attention_ops import Place, gated
from txtrain.model.trace.tape import Tape, Value
from txtrain.registry import knob, register

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "relu2", "tanh"]


@config
class MLPConfig(Component):
    """down(act(up(x))), as in the 2017 paper."""

    hidden_dim: int | None = None  # null: 4 * dim
    activation: Activation = "gelu_tanh"
    bias: bool = knob(True, carry=True)
    dropout: float = knob(0.0, carry=True)  # between activation and down projection

    n_matrices: ClassVar[int] = 2

    def width(self, model: ModelShape) -> int:
        return self.hidden_dim or 4 * model.dim

    def check(self, model: ModelShape) -> Iterator[str]:
        if self.hidden_dim is not None and self.hidden_dim < 1:
            yield f"`model.ffn.hidden_dim` must be null or at least 1, but is {self.hidden_dim} instead."
        if not 0 <= self.dropout < 1:
            yield f"`model.ffn.dropout` must be at least 0 and below 1, but is {self.dropout} instead."

    def arguments(self, model: ModelShape, layer: int = 0) -> dict[str, Any]:
        return {"hidden_dim": self.width(model), "activation": self.activation, "bias": self.bias, "ffn_dropout": self.dropout}

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        f = self.width(model)
        return self.n_matrices * model.dim * f + (((self.n_matrices - 1) * f + model.dim) if self.bias else 0)

    def flops(self, model: ModelShape, seq_len: int, layer: int = 0) -> float:
        return 2.0 * self.n_matrices * model.dim * self.width(model)

    def trace(self, t: Tape, x: Value, place: Place) -> Value:
        d, f = place.model.dim, self.width(place.model)
        h = t.activation(t.linear(x, d, f, self.bias, name="up_proj"), self.activation)
        return t.linear(t.dropout(h, self.dropout), f, d, self.bias, name="down_proj")


@config
class GatedConfig(MLPConfig):
    """down(act(gate(x)) * up(x)): GLU variants (2002.05202)."""

    hidden_dim: int | None = knob(None, carry=True)  # null: 8/3 * dim, up to a multiple of 8, so that a swap keeps the parameters
    activation: Activation = "silu"
    bias: bool = knob(False, carry=True)

    n_matrices: ClassVar[int] = 3

    def width(self, model: ModelShape) -> int:
        return self.hidden_dim or math.ceil(model.dim / 3) * 8

    def trace(self, t: Tape, x: Value, place: Place) -> Value:
        return gated(t, x, place.model.dim, self.width(place.model), self.activation, self.dropout, self.bias)


register("ffn", "mlp", "txtrain.model.ffn.dense:MLP", MLPConfig)
register("ffn", "swiglu geglu", "txtrain.model.ffn.dense:GatedFFN", GatedConfig)

"""The dense options of the FFN, and the base of all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from txtrain.model.component import Component, Size
from txtrain.model.shape import ModelShape
from txtrain.model.trace.attention_ops import Place, gated
from txtrain.model.trace.tape import Tape, Value
from txtrain.registry import BASES, Cut, config, dropout_knob, knob, register

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "relu2", "tanh"]


@config
class FFNBase(Component):
    """What other parts may ask of any FFN."""

    n_experts = 0  # a field of mixtures only

    def n_active_params(self, model: ModelShape, layer: int = 0) -> int:
        """Parameters that one token uses."""
        return self.n_params(model, layer)

    def flops(self, model: ModelShape, seq_len: int, layer: int = 0) -> float:
        """Forward FLOPs per token; by default a multiplication and an addition per parameter."""
        return 2.0 * self.n_params(model, layer)


@config
class MLPConfig(FFNBase):
    """down(act(up(x))) (1706.03762)."""

    hidden_dim: int | None = knob(None, at_least=1)  # null: 4 * dim
    activation: Activation = "gelu_tanh"
    bias: bool = knob(True, carry=True)
    dropout: float = dropout_knob()  # between activation and down projection

    n_matrices: ClassVar[int] = 2

    def width(self, model: ModelShape) -> int:
        return self.hidden_dim or 4 * model.dim

    def divided(self, model: ModelShape) -> Iterator[Size]:
        yield Size("model.ffn.hidden_dim", self.width(model))

    def arguments(self, model: ModelShape, layer: int = 0) -> dict[str, Any]:
        own = {"activation": self.activation, "bias": self.bias, "ffn_dropout": self.dropout}
        return {"hidden_dim": self.width(model), **own}

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

    # null: 8/3 * dim, rounded up to a multiple of 8: about as many parameters as an MLP.
    hidden_dim: int | None = knob(None, at_least=1, carry=True)
    activation: Activation = "silu"
    bias: bool = knob(False, carry=True)

    n_matrices: ClassVar[int] = 3

    def width(self, model: ModelShape) -> int:
        return self.hidden_dim or math.ceil(model.dim / 3) * 8

    def trace(self, t: Tape, x: Value, place: Place) -> Value:
        return gated(t, x, place.model.dim, self.width(place.model), self.activation, self.dropout, self.bias)


BASES["ffn"] = FFNBase
CUT: Cut = {"up_proj": "rows", "down_proj": "columns"}
GATED_CUT: Cut = {**CUT, "gate_proj": "rows"}
register("ffn", "mlp", "txtrain.model.ffn.dense:MLP", MLPConfig, CUT)
register("ffn", "swiglu geglu", "txtrain.model.ffn.dense:GatedFFN", GatedConfig, GATED_CUT)

"""The options moe and moe_softmax of the FFN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from txtrain.model.component import Size, must_divide
from txtrain.model.ffn.dense_config import GATED_CUT, Activation, FFNBase
from txtrain.model.shape import ModelShape
from txtrain.model.trace.attention_ops import Place, gated
from txtrain.model.trace.tape import Tape, Value
from txtrain.registry import Cut, config, dropout_knob, knob, register


@config
class MoEConfig(FFNBase):
    """Each token visits top_k of n_experts gated FFNs, and n_shared that all tokens visit. Experts have no capacity.

    moe: DeepSeek-V3's (2412.19437), a sigmoid gate, balanced by a bias on the choice. moe_softmax: Mixtral's
    (2401.04088), a softmax gate, balanced by Switch's auxiliary loss (2101.03961). All knobs combine freely.
    """

    n_experts: int = knob(8, at_least=2)
    top_k: int = knob(2, at_least=1)
    n_shared: int = knob(1, at_least=0)
    # Of one expert; null: a token's experts together are as wide as a gated FFN.
    hidden_dim: int | None = knob(None, at_least=1)
    activation: Activation = "silu"
    dropout: float = dropout_knob()  # between activation and down projection
    dense_layers: int = knob(0, at_least=0)  # so many first layers have a dense gated FFN
    dense_hidden_dim: int | None = knob(None, at_least=1)  # of these; null: 8/3 * dim, rounded up to a multiple of 8
    gate: Literal["sigmoid", "softmax"] = "sigmoid"
    normalise: bool = True  # a token's weights sum to 1, before routed_scale
    routed_scale: float = knob(1.0, above=0)
    # Groups of experts; a token's experts come from its best top_k_groups of them.
    n_groups: int = knob(1, at_least=1)
    top_k_groups: int = knob(1, at_least=1)
    # Change of an expert's bias on the choice after each step, up if it was visited too little; 0: no bias.
    bias_update_rate: float = knob(1e-3, at_least=0, affects="training")
    aux_weight: float = knob(0.0, at_least=0, affects="training")  # of the auxiliary loss; 0: none

    def width(self, model: ModelShape) -> int:
        return self.hidden_dim or math.ceil(math.ceil(model.dim / 3) / (self.top_k + self.n_shared)) * 8

    def dense_width(self, model: ModelShape) -> int:
        return self.dense_hidden_dim or math.ceil(model.dim / 3) * 8

    def divided(self, model: ModelShape) -> Iterator[Size]:
        yield Size("model.ffn.hidden_dim", self.width(model))
        if self.dense_layers:
            yield Size("model.ffn.dense_hidden_dim", self.dense_width(model))

    def check(self, model: ModelShape) -> Iterator[str]:
        path = "model.ffn"
        if (dense := self.dense_layers) >= (n := model.n_layers):
            yield f"`{path}.dense_layers` must be below model.n_layers ({n}), but is {dense} instead. Nearest: {n - 1}."
        if self.n_experts % self.n_groups:
            yield must_divide(f"{path}.n_groups", self.n_groups, "n_experts", self.n_experts)
            return
        if (kept := self.top_k_groups) > (groups := self.n_groups):
            given = f"at most n_groups ({groups}), but is {kept} instead"
            yield f"`{path}.top_k_groups` must be {given}. Nearest: {groups}."
            return
        eligible = self.n_experts // self.n_groups * self.top_k_groups
        if self.top_k > eligible:
            given = f"at most the {eligible} experts of top_k_groups groups, but is {self.top_k} instead"
            yield f"`{path}.top_k` must be {given}. Nearest: {eligible}."
        if self.top_k == 1 and self.normalise:
            why = "the one weight would always be 1, and the router would learn nothing"
            yield f"`{path}.normalise` must be false with top_k=1, but is true instead: {why}."

    def arguments(self, model: ModelShape, layer: int = 0) -> dict[str, Any]:
        left_out = ("hidden_dim", "dropout", "dense_layers", "dense_hidden_dim")
        knobs = {name: value for name, value in super().arguments(model, layer).items() if name not in left_out}
        dense = self.dense_width(model) if layer < self.dense_layers else None
        return {**knobs, "hidden_dim": self.width(model), "dense_hidden_dim": dense, "ffn_dropout": self.dropout}

    def _n_params(self, model: ModelShape, layer: int, n_routed: int) -> int:
        if layer < self.dense_layers:
            return 3 * model.dim * self.dense_width(model)
        return model.dim * (self.n_experts + 3 * self.width(model) * (n_routed + self.n_shared))

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        return self._n_params(model, layer, self.n_experts)

    def n_active_params(self, model: ModelShape, layer: int = 0) -> int:
        return self._n_params(model, layer, self.top_k)

    def flops(self, model: ModelShape, seq_len: int, layer: int = 0) -> float:
        return 2.0 * self.n_active_params(model, layer)

    def trace(self, t: Tape, x: Value, place: Place) -> Value:
        model, d, f, n = place.model, place.model.dim, self.width(place.model), place.tokens
        if place.layer < self.dense_layers:
            return gated(t, x, d, self.dense_width(model), self.activation, self.dropout)
        rows, experts = n * self.top_k, self.n_experts
        with t.exactly():
            router = t.parameter(experts, d, name="router.weight")
            scores = t.pointwise(t.linear(t.to(x, 4), d, experts, weight=router), "result")
        weights = t.picked(scores, rows, index=8 * rows)  # of the chosen experts
        if self.normalise:
            weights = t.mul(weights, t.mean(weights, n))
        weights = t.scaled(weights)
        order = t.constant(2 * rows, 8)  # each row's token, and its place

        def computed(h: Value) -> Value:
            gate = t.grouped(h, d, f, experts, "experts.gate_proj")
            h = t.glu(gate, t.grouped(h, d, f, experts, "experts.up_proj"), self.activation)
            del gate
            return t.grouped(t.dropout(h, self.dropout), f, d, experts, "experts.down_proj")

        h = t.experts(t.picked(x, rows * d, index=0), d, computed)
        y = t.to(t.added_up(t.mul(h, t.picked(weights, rows, index=0)), n * d, order), x.size)
        del h, order
        if not self.n_shared:
            return y
        return t.add(y, t.named("shared", gated, t, x, d, self.n_shared * f, self.activation, self.dropout))


CUT: Cut = {**GATED_CUT, "aux_weight": "equal_part", "experts": "experts"}
register("ffn", "moe moe_softmax", "txtrain.model.ffn.moe:feed_forward", MoEConfig, CUT)

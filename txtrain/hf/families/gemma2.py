"""Gemma2ForCausalLM (2408.00118) = Gemma + norms on both sides, windows on some layers, softcaps, its own scale."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

from txtrain.errors import ConfigError
from txtrain.hf.class_fields import of_last_token
from txtrain.hf.families.gemma import GEMMA
from txtrain.hf.families.llama2 import ACTIVATIONS, EMBEDDING, ENDS, MATRICES, heads_must_divide_dim
from txtrain.hf.fields import Choice, Field, LayerWindows, integer, number, optional
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import linears

_BASE = GEMMA.without("hidden_act")
_NORMS = {
    "input_layernorm": "attention_residual.pre_norm", "post_attention_layernorm": "attention_residual.post_norm",
    "pre_feedforward_layernorm": "ffn_residual.pre_norm", "post_feedforward_layernorm": "ffn_residual.post_norm",
}


def scale_of(name: str, n: Any) -> float:
    """attention.scale: query_pre_attn_scalar ** -0.5."""
    n = integer(name, int(n) if type(n) is float and n.is_integer() else n)
    if n < 1:
        raise ConfigError(f"`{name}` must be at least 1, but is {n} instead.")
    return float(n**-0.5)


GEMMA2: HFClass = dc.replace(
    _BASE,
    architecture="Gemma2ForCausalLM", model_type="gemma2", family="gemma2",
    parts=(
        *_BASE.parts, Choice("hidden_activation", "ffn.activation", words=ACTIVATIONS), LayerWindows(),
        Field("query_pre_attn_scalar", "attention.scale", scale_of, back=lambda scale: round(scale**-2)),
        Field("attn_logit_softcapping", "attention.softcap", optional(number)),
        Field("final_logit_softcapping", "logit_softcap", optional(number)),
    ),
    defaults={
        **_BASE.defaults, "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096,
        "layer_types": None, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    fixed={**GEMMA.fixed, "norm_position": "sandwich"},
    rows=(EMBEDDING, *linears("model.layers.{}.", "blocks.{}.", _NORMS), *MATRICES, *ENDS),
    must_be={"use_bidirectional_attention": (False, None), "mlp_bias": (False,)},
    harmless="hidden_act sliding_window_size",  # in published folders, and never read
    demands=heads_must_divide_dim,
)

GEMMA2_CLASSES = of_last_token(GEMMA2, "Gemma2ForSequenceClassification", "final_logit_softcapping")

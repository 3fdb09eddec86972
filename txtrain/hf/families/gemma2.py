"""Gemma2ForCausalLM (2408.00118) = Gemma + norms on both sides, windows on some layers, soft caps, a scale of its own."""

from __future__ import annotations

import dataclasses as dc

from txtrain.hf.families.gemma import GEMMA
from txtrain.hf.families.llama2 import ACTIVATIONS, EMBEDDING, ENDS, MATRICES, heads_must_divide_dim
from txtrain.hf.fields import Choice, Field, LayerWindows, PreAttentionScalar, number, optional
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import linear

GEMMA2: HFClass = dc.replace(
    GEMMA,
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    family="gemma2",
    parts=(
        *(part for part in GEMMA.parts if part.names != ("hidden_act",)),
        Choice("hidden_activation", "ffn.activation", words=ACTIVATIONS),
        LayerWindows(),
        PreAttentionScalar(),
        Field("attn_logit_softcapping", "attention.softcap", optional(number)),
        Field("final_logit_softcapping", "logit_softcap", optional(number)),
    ),
    defaults={name: value for name, value in GEMMA.defaults.items() if name != "hidden_act"}
    | {
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 4096,
        "layer_types": None,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    fixed={**GEMMA.fixed, "norm_position": "sandwich"},
    rows=(
        EMBEDDING,
        linear("model.layers.{}.input_layernorm", "blocks.{}.attention_residual.pre_norm"),
        linear("model.layers.{}.post_attention_layernorm", "blocks.{}.attention_residual.post_norm"),
        linear("model.layers.{}.pre_feedforward_layernorm", "blocks.{}.ffn_residual.pre_norm"),
        linear("model.layers.{}.post_feedforward_layernorm", "blocks.{}.ffn_residual.post_norm"),
        *MATRICES,
        *ENDS,
    ),
    must_be={"use_bidirectional_attention": (False, None), "mlp_bias": (False,)},
    harmless=frozenset({"hidden_act", "sliding_window_size"}),  # in published folders beside the fields that are read; never read
    demands=heads_must_divide_dim,
)

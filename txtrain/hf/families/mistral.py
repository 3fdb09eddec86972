"""MistralForCausalLM (2310.06825) = Llama 2 + a sliding window, without biases."""

from __future__ import annotations

import dataclasses as dc

from txtrain.hf.class_fields import of_last_token
from txtrain.hf.families.llama2 import LLAMA2
from txtrain.hf.fields import Field, integer, optional
from txtrain.hf.hf_class import HFClass

_BASE = LLAMA2.without("attention_bias", "mlp_bias")

MISTRAL: HFClass = dc.replace(
    _BASE,
    architecture="MistralForCausalLM", model_type="mistral", family="mistral",
    parts=(*_BASE.parts, Field("sliding_window", "attention.window", optional(integer))),
    defaults={
        **_BASE.defaults, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
    },
    must_be={"rope_interleaved": (False, None), "attention_bias": (False,), "mlp_bias": (False,)},
    demands=lambda model: None,
)

MISTRAL_CLASSES = of_last_token(MISTRAL, "MistralForSequenceClassification")

"""GemmaForCausalLM (2403.08295) = Llama 2 + GeGLU, norm weights as 1 + w, the embedding times sqrt(dim) and tied."""

from __future__ import annotations

import dataclasses as dc

from txtrain.hf.class_fields import of_last_token
from txtrain.hf.families.llama2 import ACTIVATIONS, LLAMA2
from txtrain.hf.fields import Choice
from txtrain.hf.hf_class import HFClass

# The first releases say "gelu" by mistake; the class reads it as the tanh approximation, which trained them.
GEMMA_ACTIVATIONS = (*(pair for pair in ACTIVATIONS if pair[0] != "gelu"), ("gelu", "gelu_tanh"))
_BASE = LLAMA2.without("mlp_bias", "hidden_act")

GEMMA: HFClass = dc.replace(
    _BASE,
    architecture="GemmaForCausalLM", model_type="gemma", family="gemma",
    parts=(*_BASE.parts, Choice("hidden_act", "ffn.activation", words=GEMMA_ACTIVATIONS)),
    defaults={
        **_BASE.defaults, "num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192, "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1,
        "pad_token_id": 0,
    },
    fixed={**LLAMA2.fixed, "ffn.type": "geglu", "norm.unit_offset": True, "embedding.scale": True},
    must_be={
        "hidden_activation": ("gelu_pytorch_tanh", None),  # of older folders; the class reads hidden_act
        "use_bidirectional_attention": (False, None), "sliding_window": (None,), "mlp_bias": (False,),
    },
    demands=lambda model: None,
)

GEMMA_CLASSES = of_last_token(GEMMA, "GemmaForSequenceClassification")

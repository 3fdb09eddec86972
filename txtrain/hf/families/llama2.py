"""LlamaForCausalLM (2307.09288): RMS norms before the sublayers, rotary positions, a gated FFN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from txtrain.hf.class_fields import of_last_token
from txtrain.hf.fields import Choice, Field, Heads, TokenIds, boolean, number, rate
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import linear, linears
from txtrain.hf.rope_fields import Rope

# theirs -> ours; of several for one of ours, the first is written. gelu_new is the tanh approximation written out.
ACTIVATIONS = (
    ("silu", "silu"), ("swish", "silu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_new", "gelu_tanh"),
    ("gelu", "gelu"), ("relu", "relu"), ("relu2", "relu2"), ("tanh", "tanh"),
)


def heads_must_divide_dim(model: Mapping[str, Any]) -> str | None:
    """The class checks this even if head_dim is given."""
    n, dim = model["n_heads"], model["dim"]
    return None if dim % n == 0 else f"n_heads is {n}, which does not divide dim ({dim})"


MATRICES = (
    *linears("model.layers.{}.self_attn.", "blocks.{}.attention.", {f"{n}_proj": f"{n}_proj" for n in "qkvo"}),
    *linears("model.layers.{}.mlp.", "blocks.{}.ffn.", {f"{n}_proj": f"{n}_proj" for n in ("gate", "up", "down")}),
)
NORMS = {"input_layernorm": "attention_residual.norm", "post_attention_layernorm": "ffn_residual.norm"}
EMBEDDING = linear("model.embed_tokens", "embedding.token")
ENDS = (linear("model.norm", "final_norm"), linear("lm_head", "head"))

LLAMA2 = HFClass(
    architecture="LlamaForCausalLM", model_type="llama", family="llama2",
    parts=(
        Field("vocab_size", "vocab_size"), Field("hidden_size", "dim"), Field("intermediate_size", "ffn.hidden_dim"),
        Field("num_hidden_layers", "n_layers"), Field("max_position_embeddings", "max_seq_len"), Heads(),
        Choice("hidden_act", "ffn.activation", words=ACTIVATIONS), Field("rms_norm_eps", "norm.eps", number), Rope(),
        Field("attention_bias", "attention.bias", boolean), Field("mlp_bias", "ffn.bias", boolean),
        Field("attention_dropout", "attention.dropout", rate), Field("initializer_range", "init.std", number),
        Field("tie_word_embeddings", "tie_word_embeddings", boolean), TokenIds(freezes_pad=True),
    ),
    defaults={
        **dict.fromkeys(Rope.names), "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False,
        "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": None,
    },
    fixed={
        "norm_position": "pre", "final_norm": True, "ffn.type": "swiglu", "position.type": "rope", "norm.type": "rms",
        "embedding.type": "token", "head.type": "lm",
    },
    rows=(EMBEDDING, *linears("model.layers.{}.", "blocks.{}.", NORMS), *MATRICES, *ENDS),
    base="model.",
    must_be={"rope_interleaved": (False, None), "sliding_window": (None,)},
    buffers=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    demands=heads_must_divide_dim,
)

LLAMA2_CLASSES = of_last_token(LLAMA2, "LlamaForSequenceClassification")

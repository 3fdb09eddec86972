"""OpenAIGPTLMHeadModel (Radford et al. 2018): norms after the residual sum, learned positions, every width from dim."""

from __future__ import annotations

from txtrain.hf.class_fields import of_last_token
from txtrain.hf.fields import Choice, Dropouts, Field, Heads, TokenIds, boolean, number
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import conv1d, linear

_ACTIVATIONS = (("gelu", "gelu_tanh"), ("relu", "relu"), ("silu", "silu"), ("swish", "silu"))

GPT1 = HFClass(
    architecture="OpenAIGPTLMHeadModel", model_type="openai-gpt", family="gpt1",
    parts=(
        Field("vocab_size", "vocab_size"), Field("n_positions", "max_seq_len"), Field("n_embd", "dim"),
        Field("n_layer", "n_layers"), Heads("n_head", None, None), Choice("afn", "ffn.activation", words=_ACTIVATIONS),
        Dropouts(), Field("layer_norm_epsilon", "norm.eps", number), Field("initializer_range", "init.std", number),
        Field("tie_word_embeddings", "tie_word_embeddings", boolean), TokenIds(freezes_pad=False),
    ),
    defaults={
        "afn": "gelu", "embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1, "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None,
    },
    fixed={
        "norm_position": "post", "final_norm": False, "attention.bias": True, "ffn.type": "mlp", "ffn.bias": True,
        "position.type": "learned", "norm.type": "layer", "embedding.type": "token", "head.type": "lm",
    },
    rows=(
        linear("transformer.tokens_embed", "embedding.token"),
        linear("transformer.positions_embed", "position.embedding"),
        conv1d("transformer.h.{}.attn.c_attn", *(f"blocks.{{}}.attention.{name}_proj" for name in "qkv")),
        conv1d("transformer.h.{}.attn.c_proj", "blocks.{}.attention.o_proj"),
        linear("transformer.h.{}.ln_1", "blocks.{}.attention_residual.norm"),
        conv1d("transformer.h.{}.mlp.c_fc", "blocks.{}.ffn.up_proj"),
        conv1d("transformer.h.{}.mlp.c_proj", "blocks.{}.ffn.down_proj"),
        linear("transformer.h.{}.ln_2", "blocks.{}.ffn_residual.norm"),
        linear("lm_head", "head"),
    ),
    base="transformer.",
    must_be={"n_special": (0,)},
    harmless="n_ctx predict_special_tokens summary_type summary_use_proj summary_activation summary_proj_to_labels "
    "summary_first_dropout",
    buffers=r"transformer\.(h\.\d+\.attn\.bias|position_ids)",
)

GPT1_CLASSES = of_last_token(GPT1, "OpenAIGPTForSequenceClassification")

"""MarianMTModel, the Transformer of 2017 (1706.03762): sines before cosines, a bias on the logits."""

from __future__ import annotations

import dataclasses as dc

from txtrain.hf.families.llama2 import ACTIVATIONS
from txtrain.hf.fields import Choice, Constant, Field, Same, TokenIds, boolean, number
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import Row, linear, linears
from txtrain.model.config import ModelConfig


def _untied(model: ModelConfig) -> bool:
    return model.share_embeddings and not model.tie_word_embeddings


def _apart(model: ModelConfig) -> bool:
    return not model.share_embeddings


_NAMES = {  # a module of a layer -> ours
    **{f"self_attn.{name}_proj": f"attention.{name}_proj" for name in "qkv"},
    "self_attn.out_proj": "attention.o_proj", "self_attn_layer_norm": "attention_residual.norm",
    **{f"encoder_attn.{name}_proj": f"cross_attention.{name}_proj" for name in "qkv"},
    "encoder_attn.out_proj": "cross_attention.o_proj", "encoder_attn_layer_norm": "cross_attention_residual.norm",
    "fc1": "ffn.up_proj", "fc2": "ffn.down_proj", "final_layer_norm": "ffn_residual.norm",
}
_EMBEDDINGS = ("model.encoder.embed_tokens", "model.decoder.embed_tokens")
_BIAS = "final_logits_bias"

BODY = (
    Row("model.shared", ("embedding.token",), when=lambda model: model.share_embeddings),
    Row("model.decoder.embed_tokens", ("embedding.token",), when=_apart),
    Row("model.encoder.embed_tokens", ("encoder_embedding.token",), when=_apart),
    # Version 5 ties these to the first only if the head is tied too.
    *(Row(f"{name}.weight", ("embedding.token.weight",), when=_untied, spare=True) for name in _EMBEDDINGS),
    *linears("model.encoder.layers.{}.", "encoder.blocks.{}.", {t: o for t, o in _NAMES.items() if "cross" not in o}),
    *linears("model.decoder.layers.{}.", "blocks.{}.", _NAMES),
    linear("lm_head.weight", "head.weight"),
)

MARIAN = HFClass(
    architecture="MarianMTModel", model_type="marian", family="transformer",
    parts=(
        Same(("vocab_size", "decoder_vocab_size"), "vocab_size"), Field("d_model", "dim"),
        Field("encoder_layers", "n_encoder_layers"), Field("decoder_layers", "n_layers"),
        Same(("encoder_attention_heads", "decoder_attention_heads"), "n_heads"),
        Same(("encoder_ffn_dim", "decoder_ffn_dim"), "ffn.hidden_dim"), Field("max_position_embeddings", "max_seq_len"),
        Choice("activation_function", "ffn.activation", words=(("swish", "silu"), *ACTIVATIONS)),
        Constant("static_position_embeddings"), Field("scale_embedding", "embedding.scale", boolean),
        Field("share_encoder_decoder_embeddings", "share_embeddings", boolean),
        Field("tie_word_embeddings", "tie_word_embeddings", boolean), Field("dropout", "dropout", number),
        Field("attention_dropout", "attention.dropout", number), Field("activation_dropout", "ffn.dropout", number),
        Field("init_std", "init.std", number),
        TokenIds(freezes_pad=True, names=("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")),
    ),
    defaults={
        "decoder_vocab_size": None, "encoder_layers": 12, "decoder_layers": 12, "encoder_attention_heads": 16,
        "decoder_attention_heads": 16, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096, "d_model": 1024,
        "max_position_embeddings": 1024, "activation_function": "gelu", "static_position_embeddings": True,
        "scale_embedding": False, "share_encoder_decoder_embeddings": True, "tie_word_embeddings": True, "dropout": 0.1,
        "attention_dropout": 0.0, "activation_dropout": 0.0, "init_std": 0.02, "bos_token_id": None, "eos_token_id": 0,
        "pad_token_id": 58100, "decoder_start_token_id": 58100,
    },
    fixed={
        "topology": "encoder_decoder", "norm_position": "post", "final_norm": False, "attention.type": "mha",
        "attention.bias": True, "ffn.type": "mlp", "ffn.bias": True, "position.type": "sinusoidal",
        "position.layout": "halves", "norm.type": "layer", "embedding.type": "token", "head.type": "lm",
        "head.bias": True,
    },
    rows=(Row(_BIAS, ("head.bias",), leading=True), *BODY),
    base="",
    must_be={
        "is_encoder_decoder": (True,), "normalize_before": (False, None), "normalize_embedding": (False, None),
        "add_final_layer_norm": (False, None), "extra_pos_embeddings": (0, None), "encoder_layerdrop": (0, 0.0, None),
        "decoder_layerdrop": (0, 0.0, None),
    },
    harmless="num_hidden_layers add_bias_logits classif_dropout classifier_dropout bad_words_ids",
    copies=dict.fromkeys((f"{name}.weight" for name in _EMBEDDINGS), "model.shared.weight"),
    sinusoids=r"model\.(encoder|decoder)\.embed_positions\.weight",
    marker=_BIAS,
)

# Folders without the bias: the class adds zeros.
MARIAN_UNBIASED: HFClass = dc.replace(MARIAN, fixed={**MARIAN.fixed, "head.bias": False}, rows=BODY, marker=None)

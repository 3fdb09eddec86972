"""BertForPreTraining and BertForMaskedLM (1810.04805): a post-norm encoder with masked-word and next-sentence heads."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

from txtrain.hf.families.gpt1 import GPT1
from txtrain.hf.families.llama2 import ACTIVATIONS
from txtrain.hf.fields import Choice, Field, Fields, Heads, TokenIds, Values, boolean, number
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import Row, linear, linears
from txtrain.model.config import ModelConfig


class BodyAndHead(Choice):
    """One activation for the FFNs and for the head."""

    def read(self, fields: Fields) -> Values:
        (word,) = super().read(fields).values()
        return {"ffn.activation": word, "head.activation": word}


def has_segments(model: Mapping[str, Any]) -> str | None:
    return None if model["embedding.n_types"] else "embedding.n_types is 0: the class has at least one segment"


def _untied(model: ModelConfig) -> bool:
    return not model.tie_word_embeddings


BODY = (
    *linears("bert.embeddings.", "", {
        "word_embeddings": "embedding.token", "position_embeddings": "position.embedding",
        "token_type_embeddings": "embedding.segment", "LayerNorm": "embedding.norm",
    }),
    *linears("bert.encoder.layer.{}.", "blocks.{}.", {
        "attention.self.query": "attention.q_proj", "attention.self.key": "attention.k_proj",
        "attention.self.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
        "attention.output.LayerNorm": "attention_residual.norm", "intermediate.dense": "ffn.up_proj",
        "output.dense": "ffn.down_proj", "output.LayerNorm": "ffn_residual.norm",
    }),
)
MASKED_WORDS = (
    *linears("cls.predictions.transform.", "head.", {"dense": "dense", "LayerNorm": "norm"}),
    Row("cls.predictions", ("head",), when=lambda model: model.tie_word_embeddings),
    Row("cls.predictions.decoder", ("head",), when=_untied),
    # Version 4 ties this bias to the decoder's and writes it alone; version 5 reads the decoder's.
    Row("cls.predictions.bias", ("head.bias",), when=_untied, spare=True),
)
SENTENCES = (linear("bert.pooler.dense", "head.pooler"), linear("cls.seq_relationship", "head.next_sentence"))

SIZES = (
    Field("hidden_size", "dim"), Field("num_hidden_layers", "n_layers"), Heads(n_kv_heads=None, head_dim=None),
    Field("intermediate_size", "ffn.hidden_dim"),
)
RATES = (
    Field("hidden_dropout_prob", "dropout", number), Field("attention_probs_dropout_prob", "attention.dropout", number),
    Field("initializer_range", "init.std", number), Field("layer_norm_eps", "norm.eps", number),
)

BERT = HFClass(
    architecture="BertForPreTraining", model_type="bert", family="bert",
    parts=(
        Field("vocab_size", "vocab_size"), *SIZES, BodyAndHead("hidden_act", "ffn.activation", words=ACTIVATIONS),
        *RATES, Field("max_position_embeddings", "max_seq_len"), Field("type_vocab_size", "embedding.n_types"),
        Field("tie_word_embeddings", "tie_word_embeddings", boolean), TokenIds(freezes_pad=True),
    ),
    defaults={
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 512, "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12,
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    },
    fixed={**GPT1.fixed, "topology": "encoder", "embedding.norm": True, "head.type": "mlm", "head.next_sentence": True},
    rows=(*BODY, *SENTENCES, *MASKED_WORDS),
    base="",
    must_be={
        "is_decoder": (False, None), "position_embedding_type": ("absolute", None),
        "tie_encoder_decoder": (False, None),
    },
    harmless="classifier_dropout directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers "
    "pooler_size_per_head pooler_type",
    buffers=r"bert\.embeddings\.(position_ids|token_type_ids)",
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),  # of the first BERTs
    copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    marker="cls.seq_relationship.weight",
    demands=has_segments,
)

BERT_MLM: HFClass = dc.replace(
    BERT,
    architecture="BertForMaskedLM",
    fixed={**BERT.fixed, "head.next_sentence": False},
    rows=(*BODY, *MASKED_WORDS),
    buffers=BERT.buffers + r"|bert\.pooler\..*",
    marker=None,
)

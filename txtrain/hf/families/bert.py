"""BertForPreTraining, BertForMaskedLM (1810.04805): a post-norm encoder with masked-word and next-sentence heads.

Also BertForSequenceClassification, whose head reads the pooler, and BertModel, which has none.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

from txtrain.hf.class_fields import CLASS_DEFAULTS, Classes
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
POOLER = linear("bert.pooler.dense", "head.pooler")
SENTENCES = (POOLER, linear("cls.seq_relationship", "head.next_sentence"))

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


@dc.dataclass(frozen=True)
class ClassifierDropout:
    """null: that of hidden states."""

    names: tuple[str, ...] = ("classifier_dropout",)

    def read(self, fields: Fields) -> Values:
        given = fields["classifier_dropout"]
        name = "hidden_dropout_prob" if given is None else "classifier_dropout"
        return {"head.dropout": number(name, fields[name])}

    def write(self, model: Values) -> Fields:
        rate = model["head.dropout"]
        return {"classifier_dropout": None if rate == model["dropout"] else rate}


_PARTS = tuple(
    Choice("hidden_act", "ffn.activation", words=ACTIVATIONS) if isinstance(part, BodyAndHead) else part
    for part in BERT.parts
)
_BODY = {name: value for name, value in BERT.fixed.items() if name != "head.next_sentence"}

BERT_CLASSES: HFClass = dc.replace(
    BERT,
    architecture="BertForSequenceClassification",
    parts=(*_PARTS, Classes(), ClassifierDropout()),
    defaults={**BERT.defaults, **CLASS_DEFAULTS, "classifier_dropout": None},
    fixed={**_BODY, "head.type": "class", "head.pooling": "first", "head.pooler": True, "head.bias": True},
    rows=(*BODY, POOLER, linear("classifier", "head.classifier")),
    copies={},
    marker="classifier.weight",
)


def headless(hf: HFClass, prefix: str, architecture: str, marker: str | None, pooler: bool) -> HFClass:
    """The class of the body alone, whose names have no prefix, with a pooler or without one."""
    body = [row._replace(theirs=row.theirs.removeprefix(prefix)) for row in hf.rows if row.theirs.startswith(prefix)]
    rows = [row for row in body if "head.pooler" not in row.ours]
    return dc.replace(
        hf,
        architecture=architecture,
        fixed={**_without_head(hf.fixed), "head.type": "none", "head.pooler": pooler},
        rows=(*rows, linear("pooler.dense", "head.pooler")),
        buffers=hf.buffers.replace(prefix.replace(".", r"\."), ""),
        renamed=tuple((there.replace(f"^{prefix}".replace(".", r"\."), "^"), here.removeprefix(prefix))
                      for there, here in hf.renamed),
        marker=marker,
        copies={},
    )


def _without_head(fixed: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fixed.items() if not name.startswith("head.")}


BERT_BODY: HFClass = headless(
    dc.replace(BERT, parts=_PARTS), "bert.", "BertModel", "pooler.dense.weight", pooler=True
)
BERT_BODY_UNPOOLED: HFClass = headless(
    dc.replace(BERT, parts=_PARTS), "bert.", "BertModel", "embeddings.word_embeddings.weight", pooler=False
)

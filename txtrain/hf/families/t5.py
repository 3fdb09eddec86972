"""T5ForConditionalGeneration (1910.10683): two stacks, RMS norms before the sublayers, a bias by distance only.

Two tables for one class: the first release has a plain FFN, v1.1 and later ones a gated one. And two for
T5ForSequenceClassification: the decoder reads the source again, and its last token is classified.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Collection, Mapping

from txtrain.errors import ConfigError
from txtrain.hf.class_fields import CLASS_DEFAULTS, Classes
from txtrain.hf.families.gpt2 import ACTIVATIONS
from txtrain.hf.fields import Choice, Field, Fields, Heads, TokenIds, Values, boolean, number
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import Row, linear, linears

HEAD, SHARED = "lm_head.weight", "shared.weight"


class DecoderLayers(Field):
    """null: the encoder's number."""

    def read(self, fields: Fields) -> Values:
        return super().read({self.name: fields["num_layers"] if fields[self.name] is None else fields[self.name]})


@dc.dataclass(frozen=True)
class FeedForward:
    """An activation, perhaps after `gated-`; gated-gelu means gelu_new. Two derived fields win if a folder has them."""

    gated: bool
    names: tuple[str, ...] = ("feed_forward_proj", "dense_act_fn", "is_gated_act")

    def read(self, fields: Fields) -> Values:
        word, function, gated = (fields[name] for name in self.names)
        if gated not in (None, self.gated):
            given = f"{str(self.gated).lower()} with feed_forward_proj={word}, but is {gated} instead"
            raise ConfigError(f"`is_gated_act` must be {given}.")
        meant = "gelu_new" if word == "gated-gelu" else str(word).removeprefix("gated-")
        words = tuple((_word(name, self.gated), ours) for name, ours in ACTIVATIONS)
        known = _word(meant, self.gated) if meant in dict(ACTIVATIONS) else word
        read = Choice("feed_forward_proj", "ffn.activation", words=words).read({"feed_forward_proj": known})
        return read if function is None else Choice("dense_act_fn", "ffn.activation", words=ACTIVATIONS).read(fields)

    def write(self, model: Values) -> Fields:
        (function,) = Choice("dense_act_fn", "ffn.activation", words=ACTIVATIONS).write(model).values()
        word = "gated-gelu" if self.gated and function == "gelu_new" else _word(function, self.gated)
        return {"feed_forward_proj": word, "dense_act_fn": function, "is_gated_act": self.gated}


def _word(activation: str, gated: bool) -> str:
    return f"gated-{activation}" if gated else activation


def is_gated(given: Fields) -> bool:
    return str(given.get("feed_forward_proj", "relu")).startswith("gated-")


class DropoutRate(Field):
    """One rate for all dropouts, those of FFNs and of the stacks' outputs included."""

    def read(self, fields: Fields) -> Values:
        (rate,) = super().read(fields).values()
        return dict.fromkeys(("dropout", "attention.dropout", "ffn.dropout", "output_dropout"), rate)


@dc.dataclass(frozen=True)
class OutputScale:
    """Whether the head's input is divided by sqrt(dim); without that field, if tie_word_embeddings is true."""

    names: tuple[str, ...] = ("tie_word_embeddings", "scale_decoder_outputs")

    def read(self, fields: Fields) -> Values:
        tied, scaled = (fields[name] for name in self.names)
        tied = boolean("tie_word_embeddings", tied)
        scaled = tied if scaled is None else boolean("scale_decoder_outputs", scaled)
        return {"tie_word_embeddings": tied, "head.scale": scaled}

    def write(self, model: Values) -> Fields:
        return dict(zip(self.names, (model["tie_word_embeddings"], model["head.scale"] is not None), strict=True))


def tied_as_the_files_say(given: Fields, names: Collection[str], same: Callable[[str, str], bool]) -> Fields:
    """Whatever the field says, the head is the embedding unless the files have another."""
    own = HEAD in names and not (SHARED in names and same(HEAD, SHARED))
    scaled = given.get("scale_decoder_outputs")
    scaled = given.get("tie_word_embeddings") is not False if scaled is None else scaled
    return {**given, "tie_word_embeddings": not own, "scale_decoder_outputs": scaled}


_ENCODER, _DECODER = "encoder.block.{}.layer.", "decoder.block.{}.layer."
_OURS = {f"{_ENCODER}1.DenseReluDense.": "encoder.blocks.{}.ffn.", f"{_DECODER}2.DenseReluDense.": "blocks.{}.ffn."}
_QKVO = {name: f"{name}_proj" for name in "qkvo"}


def _ffn(names: Mapping[str, str]) -> tuple[Row, ...]:
    return tuple(row for theirs, ours in _OURS.items() for row in linears(theirs, ours, names))


BODY = (
    linear("shared", "embedding.token"),
    *linears(f"{_ENCODER}0.SelfAttention.", "encoder.blocks.{}.attention.", _QKVO),
    linear("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "encoder.position.embedding"),
    linear(f"{_ENCODER}0.layer_norm", "encoder.blocks.{}.attention_residual.norm"),
    linear(f"{_ENCODER}1.layer_norm", "encoder.blocks.{}.ffn_residual.norm"),
    linear("encoder.final_layer_norm", "encoder.final_norm"),
    *linears(f"{_DECODER}0.SelfAttention.", "blocks.{}.attention.", _QKVO),
    linear("decoder.block.0.layer.0.SelfAttention.relative_attention_bias", "position.embedding"),
    linear(f"{_DECODER}0.layer_norm", "blocks.{}.attention_residual.norm"),
    *linears(f"{_DECODER}1.EncDecAttention.", "blocks.{}.cross_attention.", _QKVO),
    linear(f"{_DECODER}1.layer_norm", "blocks.{}.cross_attention_residual.norm"),
    linear(f"{_DECODER}2.layer_norm", "blocks.{}.ffn_residual.norm"),
    linear("decoder.final_layer_norm", "final_norm"),
    *_ffn({"wo": "down_proj"}),
)
OUTPUT = linear("lm_head", "head")

T5 = HFClass(
    architecture="T5ForConditionalGeneration", model_type="t5", family="t5",
    is_of=lambda given: not is_gated(given),
    parts=(
        Field("vocab_size", "vocab_size"), Field("d_model", "dim"), Field("d_ff", "ffn.hidden_dim"),
        Field("num_layers", "n_encoder_layers"), DecoderLayers("num_decoder_layers", "n_layers"),
        Field("n_positions", "max_seq_len"), Heads("num_heads", None, "d_kv"),
        Field("relative_attention_num_buckets", "position.n_buckets"),
        Field("relative_attention_max_distance", "position.max_distance"), FeedForward(gated=False),
        DropoutRate("dropout_rate", "dropout", number),
        Field("layer_norm_epsilon", "norm.eps", number), Field("initializer_factor", "init.std", number), OutputScale(),
        TokenIds(freezes_pad=False, names=("eos_token_id", "pad_token_id", "decoder_start_token_id")),
    ),
    defaults={
        "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_decoder_layers": None,
        "n_positions": 512,  # of no effect
        "num_heads": 8, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
        "feed_forward_proj": "relu", "dense_act_fn": None, "is_gated_act": None, "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6, "initializer_factor": 1.0, "tie_word_embeddings": True,
        "scale_decoder_outputs": None, "eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": None,
    },
    fixed={
        "topology": "encoder_decoder", "share_embeddings": True, "norm_position": "pre", "final_norm": True,
        "attention.scale": 1.0, "attention.bias": False, "ffn.type": "mlp", "ffn.bias": False,
        "position.type": "relative", "norm.type": "rms", "embedding.type": "token", "head.type": "lm",
        "init.distribution": "fan_in",
    },
    rows=(*BODY, *_ffn({"wi": "up_proj"}), OUTPUT),
    base="",
    must_be={"is_encoder_decoder": (True,)},
    harmless="classifier_dropout bos_token_id output_past",
    # Of the first release, and never read.
    buffers=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    copies={"encoder.embed_tokens.weight": SHARED, "decoder.embed_tokens.weight": SHARED},
    settled=tied_as_the_files_say,
)

T5_V1_1: HFClass = dc.replace(
    T5,
    family="t5_v1_1",
    is_of=is_gated,
    parts=tuple(FeedForward(gated=True) if isinstance(part, FeedForward) else part for part in T5.parts),
    fixed={**T5.fixed, "ffn.type": "geglu"},
    rows=(*BODY, *_ffn({"wi_0": "gate_proj"}), *_ffn({"wi_1": "up_proj"}), OUTPUT),
)


@dc.dataclass(frozen=True)
class HeadDropouts:
    """Before each of the head's two layers."""

    names: tuple[str, ...] = ("classifier_dropout",)

    def read(self, fields: Fields) -> Values:
        return dict.fromkeys(("head.dropout", "head.input_dropout"), number(self.names[0], fields[self.names[0]]))

    def write(self, model: Values) -> Fields:
        return {self.names[0]: model["head.dropout"]}


def of_end_token(hf: HFClass) -> HFClass:
    """T5ForSequenceClassification, whose embeddings are always one."""
    parts = [Field("tie_word_embeddings", "tie_word_embeddings", boolean) if isinstance(part, OutputScale) else part
             for part in hf.parts]
    named = [row._replace(theirs=f"transformer.{row.theirs}") for row in hf.rows if row.ours != ("head",)]
    head = linears("classification_head.", "head.", {"dense": "pooler", "out_proj": "classifier"})
    prefixed = {f"transformer.{name}": f"transformer.{of}" for name, of in hf.copies.items()}
    return dc.replace(
        hf,
        architecture="T5ForSequenceClassification",
        parts=(*parts, Classes(), HeadDropouts()),
        defaults={
            **{name: value for name, value in hf.defaults.items() if name != "scale_decoder_outputs"},
            **CLASS_DEFAULTS, "classifier_dropout": 0.0,
        },
        fixed={**hf.fixed, "head.type": "class", "head.pooling": "last", "head.pooler": True, "head.bias": True},
        rows=(*named, *head),
        harmless=f"{hf.harmless} scale_decoder_outputs",
        buffers=rf"transformer\.{hf.buffers}",
        copies=prefixed,
        marker="classification_head.out_proj.weight",
        settled=lambda given, names, same: given,
    )


T5_CLASSES, T5_V1_1_CLASSES = of_end_token(T5), of_end_token(T5_V1_1)

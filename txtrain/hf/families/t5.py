"""T5ForConditionalGeneration (1910.10683): two stacks, norms without mean before the sublayers, a bias by distance, no other bias.

Two tables for one class: its first release has a plain feed-forward, v1.1 and what came after a gated one.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Collection
from typing import Any

from txtrain.errors import ConfigError
from txtrain.hf.families.gpt2 import ACTIVATIONS
from txtrain.hf.fields import Choice, Field, Fields, Heads, TokenIds, Values, boolean, number
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import linear

HEAD, SHARED = "lm_head.weight", "shared.weight"


# --------------------------------------------------------------------------------------------------------------------- fields


class DecoderLayers(Field):
    """null: as many as the encoder has."""

    def read(self, fields: Fields) -> Values:
        return super().read({self.name: fields["num_layers"] if fields[self.name] is None else fields[self.name]})


@dc.dataclass(frozen=True)
class FeedForward:
    """An activation, with `gated-` before it or not; the word gated-gelu means gelu_new. Beside it the class keeps what it makes of the
    word, and where a folder has that, it counts."""

    gated: bool
    names: tuple[str, ...] = ("feed_forward_proj", "dense_act_fn", "is_gated_act")

    def read(self, fields: Fields) -> Values:
        word, function, gated = (fields[name] for name in self.names)
        if gated not in (None, self.gated):
            raise ConfigError(f"`is_gated_act` must be {str(self.gated).lower()} with feed_forward_proj={word}, but is {gated} instead.")
        meant = _meant(word)
        plain = Choice("feed_forward_proj", "ffn.activation", words=tuple((_word(name, self.gated), ours) for name, ours in ACTIVATIONS))
        read = plain.read({"feed_forward_proj": _word(meant, self.gated) if meant in dict(ACTIVATIONS) else word})
        return read if function is None else Choice("dense_act_fn", "ffn.activation", words=ACTIVATIONS).read(fields)

    def write(self, model: Values) -> Fields:
        (function,) = Choice("dense_act_fn", "ffn.activation", words=ACTIVATIONS).write(model).values()
        word = "gated-gelu" if self.gated and function == "gelu_new" else _word(function, self.gated)
        return {"feed_forward_proj": word, "dense_act_fn": function, "is_gated_act": self.gated}


def _word(activation: str, gated: bool) -> str:
    return f"gated-{activation}" if gated else activation


def _meant(word: Any) -> str:
    return "gelu_new" if word == "gated-gelu" else str(word).removeprefix("gated-")


def is_gated(given: Fields) -> bool:
    return str(given.get("feed_forward_proj", "relu")).startswith("gated-")


def is_plain(given: Fields) -> bool:
    return not is_gated(given)


@dc.dataclass(frozen=True)
class DropoutRate:
    """One rate for all that is dropped, feed-forwards and the stacks' outputs included."""

    names: tuple[str, ...] = ("dropout_rate",)

    def read(self, fields: Fields) -> Values:
        return dict.fromkeys(("dropout", "attention.dropout", "ffn.dropout", "output_dropout"), number("dropout_rate", fields["dropout_rate"]))

    def write(self, model: Values) -> Fields:
        return {"dropout_rate": model["dropout"]}


@dc.dataclass(frozen=True)
class OutputScale:
    """Whether what enters the head is divided by sqrt(dim). Where there is no such field, it is unless tie_word_embeddings is false."""

    names: tuple[str, ...] = ("tie_word_embeddings", "scale_decoder_outputs")

    def read(self, fields: Fields) -> Values:
        tied, scaled = boolean("tie_word_embeddings", fields["tie_word_embeddings"]), fields["scale_decoder_outputs"]
        return {"tie_word_embeddings": tied, "head.scale": tied if scaled is None else boolean("scale_decoder_outputs", scaled)}

    def write(self, model: Values) -> Fields:
        return {"tie_word_embeddings": model["tie_word_embeddings"], "scale_decoder_outputs": model["head.scale"] is not None}


def tied_as_the_files_say(given: Fields, names: Collection[str], same: Callable[[str, str], bool]) -> Fields:
    """Whatever the field says, the head is the embedding unless the files hold another."""
    own = HEAD in names and not (SHARED in names and same(HEAD, SHARED))
    scaled = given.get("scale_decoder_outputs")
    return {**given, "tie_word_embeddings": not own, "scale_decoder_outputs": given.get("tie_word_embeddings") is not False if scaled is None else scaled}


# ---------------------------------------------------------------------------------------------------------------------- names


_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_ENCODER, _DECODER = "encoder.block.{}.layer", "decoder.block.{}.layer"
_FFNS = ((f"{_ENCODER}.1.DenseReluDense", "encoder.blocks.{}.ffn"), (f"{_DECODER}.2.DenseReluDense", "blocks.{}.ffn"))

BODY = (
    linear("shared", "embedding.token"),
    *(linear(f"{_ENCODER}.0.SelfAttention.{name}", f"encoder.blocks.{{}}.attention.{ours}") for name, ours in _PROJECTIONS.items()),
    linear("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "encoder.position.embedding"),
    linear(f"{_ENCODER}.0.layer_norm", "encoder.blocks.{}.attention_residual.norm"),
    linear(f"{_ENCODER}.1.layer_norm", "encoder.blocks.{}.ffn_residual.norm"),
    linear("encoder.final_layer_norm", "encoder.final_norm"),
    *(linear(f"{_DECODER}.0.SelfAttention.{name}", f"blocks.{{}}.attention.{ours}") for name, ours in _PROJECTIONS.items()),
    linear("decoder.block.0.layer.0.SelfAttention.relative_attention_bias", "position.embedding"),
    linear(f"{_DECODER}.0.layer_norm", "blocks.{}.attention_residual.norm"),
    *(linear(f"{_DECODER}.1.EncDecAttention.{name}", f"blocks.{{}}.cross_attention.{ours}") for name, ours in _PROJECTIONS.items()),
    linear(f"{_DECODER}.1.layer_norm", "blocks.{}.cross_attention_residual.norm"),
    linear(f"{_DECODER}.2.layer_norm", "blocks.{}.ffn_residual.norm"),
    linear("decoder.final_layer_norm", "final_norm"),
    *(linear(f"{theirs}.wo", f"{ours}.down_proj") for theirs, ours in _FFNS),
)
OUTPUT = linear("lm_head", "head")

# -------------------------------------------------------------------------------------------------------------------- classes

T5 = HFClass(
    architecture="T5ForConditionalGeneration",
    model_type="t5",
    family="t5",
    is_of=is_plain,
    parts=(
        Field("vocab_size", "vocab_size"),
        Field("d_model", "dim"),
        Field("d_ff", "ffn.hidden_dim"),
        Field("num_layers", "n_encoder_layers"),
        DecoderLayers("num_decoder_layers", "n_layers"),
        Field("n_positions", "max_seq_len"),
        Heads("num_heads", None, "d_kv"),
        Field("relative_attention_num_buckets", "position.n_buckets"),
        Field("relative_attention_max_distance", "position.max_distance"),
        FeedForward(gated=False),
        DropoutRate(),
        Field("layer_norm_epsilon", "norm.eps", number),
        Field("initializer_factor", "init.std", number),
        OutputScale(),
        TokenIds(freezes_pad=False, names=("eos_token_id", "pad_token_id", "decoder_start_token_id")),
    ),
    defaults={
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_decoder_layers": None,
        "n_positions": 512,  # of no effect
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "relu",
        "dense_act_fn": None,
        "is_gated_act": None,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0,
        "tie_word_embeddings": True,
        "scale_decoder_outputs": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "decoder_start_token_id": None,
    },
    fixed={
        "topology": "encoder_decoder",
        "share_embeddings": True,
        "norm_position": "pre",
        "final_norm": True,
        "attention.scale": 1.0,
        "attention.bias": False,
        "ffn.type": "mlp",
        "ffn.bias": False,
        "position.type": "relative",
        "norm.type": "rms",
        "embedding.type": "token",
        "head.type": "lm",
        "init.distribution": "fan_in",
    },
    rows=(*BODY, *(linear(f"{theirs}.wi", f"{ours}.up_proj") for theirs, ours in _FFNS), OUTPUT),
    base="",
    must_be={"is_encoder_decoder": (True,)},
    harmless=frozenset({"classifier_dropout", "bos_token_id", "output_past"}),
    buffers=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",  # of the first release, never read
    copies={"encoder.embed_tokens.weight": SHARED, "decoder.embed_tokens.weight": SHARED},
    settled=tied_as_the_files_say,
)

T5_V1_1: HFClass = dc.replace(
    T5,
    family="t5_v1_1",
    is_of=is_gated,
    parts=tuple(FeedForward(gated=True) if isinstance(part, FeedForward) else part for part in T5.parts),
    fixed={**T5.fixed, "ffn.type": "geglu"},
    rows=(
        *BODY,
        *(linear(f"{theirs}.wi_0", f"{ours}.gate_proj") for theirs, ours in _FFNS),
        *(linear(f"{theirs}.wi_1", f"{ours}.up_proj") for theirs, ours in _FFNS),
        OUTPUT,
    ),
)

"""The options of the head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from txtrain.errors import ConfigError
from txtrain.model.component import Component
from txtrain.model.ffn.dense_config import Activation
from txtrain.model.shape import ModelShape
from txtrain.model.trace.attention_ops import Batch, Place
from txtrain.model.trace.tape import Parameter, Tape, Value
from txtrain.registry import Cut, config, dropout_knob, knob, register


@config
class HeadConfig(Component):
    """What every head has. skips: its loss skips positions without a target."""

    skips: ClassVar[bool] = False
    pools: ClassVar[bool] = False  # one result for each row
    writes: ClassVar[bool] = True  # scores of the tokens at each position
    next_sentence = False  # a field of BERT's head only
    label_names = tuple[str, ...]()  # this and lm: of the class head only
    lm = False

    def flops(self, model: ModelShape, seq_len: int, layer: int = 0) -> float:
        """Forward FLOPs per position."""
        raise NotImplementedError

    def training_flops(self, model: ModelShape, seq_len: int, target_share: float) -> float:
        """Forward FLOPs per position in training, of which only target_share have a target."""
        return self.flops(model, seq_len)


@config
class LMHeadConfig(HeadConfig):
    """Logits over the vocabulary, by the embedding's weight where model.tie_word_embeddings is true."""

    bias: bool = knob(False, carry=True)
    scale: bool = False  # the input is multiplied by dim ** -0.5 (T5 v1.0)

    def arguments(self, model: ModelShape, layer: int = 0) -> dict[str, Any]:
        scale, shift = model.dim**-0.5 if self.scale else None, model.topology == "decoder"
        shared = {"tied": model.tie_word_embeddings, "softcap": model.logit_softcap}
        return {**shared, "bias": self.bias, "scale": scale, "shift": shift}

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        matrix = 0 if model.tie_word_embeddings else model.vocab_size * model.dim
        return matrix + (model.vocab_size if self.bias else 0)

    def trace_loss(self, t: Tape, x: Value, place: Place, batch: Batch, table: Parameter | None) -> Value:
        """The loss of the last norm's output. table: the embedding's, which a tied head reads."""
        x = t.scaled(x) if self.scale else x
        return vocabulary_loss(t, x, place.model, table, self.bias, batch.smoothed)

    def flops(self, model: ModelShape, seq_len: int, layer: int = 0) -> float:
        return 2.0 * model.vocab_size * model.dim


@config
class MLMHeadConfig(HeadConfig):
    """BERT's (1810.04805): dense, activation, norm, vocabulary with a bias; also the pooler and next-sentence head."""

    skips = True
    activation: Activation = "gelu"
    next_sentence: bool = True

    def arguments(self, model: ModelShape, layer: int = 0) -> dict[str, Any]:
        shared = {"tied": model.tie_word_embeddings, "softcap": model.logit_softcap}
        return {**shared, "activation": self.activation, "next_sentence": self.next_sentence}

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        dense = model.dim * model.dim + model.dim
        sentence = dense + 2 * model.dim + 2 if self.next_sentence else 0
        matrix = 0 if model.tie_word_embeddings else model.vocab_size * model.dim
        return matrix + model.vocab_size + dense + model.norm.n_params(model) + sentence

    def flops(self, model: ModelShape, seq_len: int, layer: int = 0) -> float:
        return self.training_flops(model, seq_len, target_share=1.0)

    def training_flops(self, model: ModelShape, seq_len: int, target_share: float) -> float:
        sentence = 2.0 * model.dim * (model.dim + 2) / seq_len if self.next_sentence else 0.0  # of one position
        return 2.0 * model.dim * (model.vocab_size + model.dim) * target_share + sentence

    def trace_loss(self, t: Tape, x: Value, place: Place, batch: Batch, table: Parameter | None) -> Value:
        model, d = place.model, place.model.dim
        pooled = None
        if self.next_sentence:
            pooled = t.linear(t.sliced(x, place.batch * d, copies=place.batch > 1), d, d, bias=True, name="pooler")
            pooled = t.activation(pooled, "tanh")
            pooled = t.linear(pooled, d, 2, bias=True, name="next_sentence")
        chosen = batch.chosen or place.tokens
        x = t.picked(x, chosen * d, index=8 * 2 * chosen)
        norm = model.norm.trace_of
        x = t.named("norm", norm, t, t.activation(t.linear(x, d, d, True, name="dense"), self.activation), d)
        loss = vocabulary_loss(t, x, model, table, bias=True, smoothed=False)
        return loss if pooled is None else t.add(loss, t.softmax(pooled))


Kind = Literal["single", "multi", "regression"]


@config
class ClassHeadConfig(HeadConfig):
    """One score per class, from one vector per row: of the first position (ViT's class token, BERT's [CLS]), of the
    last real one, or the mean of the real ones. null: as the papers and transformers have it for this kind of model."""

    pools: ClassVar = True
    writes: ClassVar = False

    # null: as many as the labels of the data; numbers of a regression; each has a name in an exported config.json
    n_classes: int | None = knob(None, at_least=1, at_most=1_000_000)
    pooling: Literal["first", "last", "mean"] | None = None  # null: first in an encoder, else last
    # a dense layer and tanh before the classifier (BERT's pooler, T5's head); null: not for decoders and images
    pooler: bool | None = None
    bias: bool | None = None  # of the classifier; null: not in a decoder
    dropout: float | None = dropout_knob(None)  # of the classifier's input; null: model.dropout after a pooler, else 0
    input_dropout: float = dropout_knob()  # of the pooler's input
    # one class per row; any number (binary cross-entropy of each); or numbers (squared error); data=labels sets it
    kind: Kind = knob("single", affects="training")
    label_names: tuple[str, ...] = knob((), affects="label")  # of the classes, in order; data=labels sets them
    # training also predicts the next token, by the embedding: GPT-1's auxiliary loss (objective.lm_weight)
    lm: bool = knob(False, affects="training")

    def check(self, model: ModelShape) -> Iterator[str]:
        n, names = self.n_classes, self.label_names
        if n == 1 and self.kind == "single":
            yield "`model.head.n_classes` must be at least 2 with model.head.kind=single, but is 1 instead. Nearest: 2."
        if names and n not in (None, len(names)):
            yield f"`model.head.label_names` must be {n} names (model.head.n_classes), but is {len(names)} instead."
        if self.lm and not (model.topology == "decoder" and model.tie_word_embeddings):
            needed = "a decoder with tie_word_embeddings=true, whose embedding gives the logits of the next token"
            yield f"`model.head.lm` must be false without {needed}, but is true instead."

    @property
    def n_outputs(self) -> int:
        """Raises ConfigError if the number is still to be read from the data."""
        if self.n_classes is None:
            raise ConfigError(
                "`model.head.n_classes` must be given: it is null, and only a run on data=labels reads it from data."
            )
        return self.n_classes

    def arguments(self, model: ModelShape, layer: int = 0) -> dict[str, Any]:
        decoder, pooler = model.topology == "decoder", self._pools(model)
        dropout = (model.dropout if pooler else 0.0) if self.dropout is None else self.dropout
        return {
            "n_classes": self.n_outputs,
            "pooling": self.pooling or ("first" if model.topology == "encoder" else "last"),
            "pooler": pooler, "bias": not decoder if self.bias is None else self.bias, "dropout": dropout,
            "input_dropout": self.input_dropout, "kind": self.kind, "lm": self.lm,
        }

    def _pools(self, model: ModelShape) -> bool:
        return model.topology != "decoder" and model.vocab_size > 0 if self.pooler is None else self.pooler

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        made = self.arguments(model)
        return (model.dim + made["bias"]) * self.n_outputs + made["pooler"] * (model.dim + 1) * model.dim

    def flops(self, model: ModelShape, seq_len: int, layer: int = 0) -> float:
        return 2.0 * model.dim * (self.n_outputs + self._pools(model) * model.dim) / seq_len  # of one position

    def training_flops(self, model: ModelShape, seq_len: int, target_share: float) -> float:
        return self.flops(model, seq_len) + self.lm * 2.0 * model.dim * model.vocab_size

    def trace_loss(self, t: Tape, x: Value, place: Place, batch: Batch, table: Parameter | None) -> Value:
        made, d = self.arguments(place.model), place.model.dim
        pooled = t.sliced(x, place.batch * d)
        if made["pooler"]:
            pooled = t.linear(t.dropout(pooled, made["input_dropout"]), d, d, bias=True, name="pooler")
            pooled = t.activation(pooled, "tanh")
        pooled = t.dropout(pooled, made["dropout"])
        loss = t.softmax(t.to(t.linear(pooled, d, self.n_outputs, made["bias"], name="classifier"), 4))
        return t.add(loss, vocabulary_loss(t, x, place.model, table, False, False)) if self.lm else loss


@config
class NoHeadConfig(HeadConfig):
    """None: the last hidden states alone, of a folder without a head. It cannot be trained as it is."""

    writes: ClassVar = False

    pooler: bool = False  # the folder's pooler is kept, for a class head that is put in its place

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        return self.pooler * (model.dim + 1) * model.dim

    def flops(self, model: ModelShape, seq_len: int, layer: int = 0) -> float:
        return 0.0

    def trace_loss(self, t: Tape, x: Value, place: Place, batch: Batch, table: Parameter | None) -> Value:
        return x


def vocabulary_loss(
    t: Tape, x: Value, model: ModelShape, table: Parameter | None, bias: bool, smoothed: bool
) -> Value:
    """By chunks. smoothed: so are the labels."""
    d, v, capped = model.dim, model.vocab_size, model.logit_softcap is not None
    weight = table if model.tie_word_embeddings else t.kept("head", lambda: t.parameter(v, d))
    shift = t.kept("head_bias", lambda: t.parameter(v, name="bias")) if bias else None
    assert isinstance(weight, Parameter)
    return t.chunked_loss(x, weight, shift, d, v, capped, smoothed)


CUT: Cut = {"weight": "vocabulary", "bias": "vocabulary"}
register("head", "lm", "txtrain.model.head.heads:LMHead", LMHeadConfig, CUT)
register("head", "mlm", "txtrain.model.head.heads:MLMHead", MLMHeadConfig, CUT)
register("head", "class", "txtrain.model.head.heads:ClassHead", ClassHeadConfig)
register("head", "none", "txtrain.model.head.heads:NoHead", NoHeadConfig)

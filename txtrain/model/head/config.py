"""The options of the head."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from txtrain.model.component import Component, config
from txtrain.model.ffn.dense_config import Activation
from txtrain.model.shape import ModelShape
from txtrain.model.trace.attention_ops import Batch, Place
from txtrain.model.trace.tape import Parameter, Tape, Value
from txtrain.registry import Cut, knob, register


@config
class HeadConfig(Component):
    """What every head has. skips: its loss skips positions without a target."""

    skips: ClassVar[bool] = False
    pools: ClassVar[bool] = False  # one result for each row
    next_sentence = False  # a field of BERT's head only

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


@config
class ClassHeadConfig(HeadConfig):
    """One score per class. pooling: the first (ViT's class token) or last real position, or their mean."""

    pools: ClassVar = True

    n_classes: int = knob(1000, at_least=2)
    pooling: Literal["first", "last", "mean"] = "first"

    def n_params(self, model: ModelShape, layer: int = 0) -> int:
        return (model.dim + 1) * self.n_classes

    def flops(self, model: ModelShape, seq_len: int, layer: int = 0) -> float:
        return 2.0 * model.dim * self.n_classes / seq_len  # of one position

    def trace_loss(self, t: Tape, x: Value, place: Place, batch: Batch, table: Parameter | None) -> Value:
        d = place.model.dim
        return t.softmax(t.to(t.linear(t.sliced(x, place.batch * d), d, self.n_classes, True, name="classifier"), 4))


def vocabulary_loss(
    t: Tape, x: Value, model: ModelShape, table: Parameter | None, bias: bool, smoothed: bool
) -> Value:
    """By chunks; smoothed: of all logits at once."""
    d, v, capped = model.dim, model.vocab_size, model.logit_softcap is not None
    weight = table if model.tie_word_embeddings else t.kept("head", lambda: t.parameter(v, d))
    shift = t.kept("head_bias", lambda: t.parameter(v, name="bias")) if bias else None
    assert isinstance(weight, Parameter)
    if not smoothed:
        return t.chunked_loss(x, weight, shift, d, v, capped)
    logits = t.logits(x, d, v, weight)
    logits = t.scaled(t.activation(t.scaled(logits), "tanh")) if capped else logits
    return t.softmax(t.to(logits, 4))


CUT: Cut = {"weight": "vocabulary", "bias": "vocabulary"}
register("head", "lm", "txtrain.model.head.heads:LMHead", LMHeadConfig, CUT)
register("head", "mlm", "txtrain.model.head.heads:MLMHead", MLMHeadConfig, CUT)
register("head", "class", "txtrain.model.head.heads:ClassHead", ClassHeadConfig)

"""What leaves the last block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from txtrain.model.axes.base import Component, config
from txtrain.model.axes.ffn import Activation
from txtrain.registry import knob, register

if TYPE_CHECKING:
    from txtrain.model.config import ModelConfig


@config
class HeadConfig(Component):
    """What every head has."""

    def training_flops(self, model: ModelConfig, seq_len: int, target_share: float) -> float:
        """Forward operations a position in training, where so many of the positions have a target: as many as ever, unless a head skips the rest."""
        return self.flops(model, seq_len)


@config
class LMHeadConfig(HeadConfig):
    """Logits over the vocabulary, by the embedding's own weight where model.tie_word_embeddings is true."""

    bias: bool = knob(False, carry=True)
    scale: bool = False  # what enters is multiplied by dim ** -0.5 (T5 v1.0)

    def arguments(self, model: ModelConfig, layer: int = 0) -> dict[str, Any]:
        return {
            "tied": model.tie_word_embeddings,
            "softcap": model.logit_softcap,
            "bias": self.bias,
            "scale": model.dim**-0.5 if self.scale else None,
            "shift": model.topology == "decoder",
        }

    def n_params(self, model: ModelConfig, layer: int = 0) -> int:
        return (0 if model.tie_word_embeddings else model.vocab_size * model.dim) + (model.vocab_size if self.bias else 0)

    def flops(self, model: ModelConfig, seq_len: int, layer: int = 0) -> float:
        return 2.0 * model.vocab_size * model.dim


@config
class MLMHeadConfig(HeadConfig):
    """BERT's (1810.04805): dense, activation, norm, then the vocabulary with a bias; beside it the pooler and the next-sentence head."""

    activation: Activation = "gelu"
    next_sentence: bool = True

    def arguments(self, model: ModelConfig, layer: int = 0) -> dict[str, Any]:
        return {
            "tied": model.tie_word_embeddings,
            "softcap": model.logit_softcap,
            "activation": self.activation,
            "next_sentence": self.next_sentence,
        }

    def n_params(self, model: ModelConfig, layer: int = 0) -> int:
        d = model.dim
        dense = d * d + d
        sentence = dense + 2 * d + 2 if self.next_sentence else 0
        return (0 if model.tie_word_embeddings else model.vocab_size * d) + model.vocab_size + dense + model.norm.n_params_of(d) + sentence

    def flops(self, model: ModelConfig, seq_len: int, layer: int = 0) -> float:
        return self.training_flops(model, seq_len, target_share=1.0)

    def training_flops(self, model: ModelConfig, seq_len: int, target_share: float) -> float:
        sentence = 2.0 * model.dim * (model.dim + 2) / seq_len if self.next_sentence else 0.0  # one position of the sequence
        return 2.0 * model.dim * (model.vocab_size + model.dim) * target_share + sentence


@config
class ClassHeadConfig(HeadConfig):
    """One score a class for the whole sequence. pooling: the first position (ViT's class token), the last, or the mean of the real ones."""

    n_classes: int = 1000
    pooling: Literal["first", "last", "mean"] = "first"

    def check(self, model: ModelConfig) -> Iterator[str]:
        if self.n_classes < 2:
            yield f"`model.head.n_classes` must be at least 2, but is {self.n_classes} instead."

    def n_params(self, model: ModelConfig, layer: int = 0) -> int:
        return (model.dim + 1) * self.n_classes

    def flops(self, model: ModelConfig, seq_len: int, layer: int = 0) -> float:
        return 2.0 * model.dim * self.n_classes / seq_len  # one position of the sequence


register("head", "lm", "txtrain.model.head:LMHead", LMHeadConfig)
register("head", "mlm", "txtrain.model.head:MLMHead", MLMHeadConfig)
register("head", "class", "txtrain.model.head:ClassHead", ClassHeadConfig)

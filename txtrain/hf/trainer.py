"""Models that `transformers.Trainer` trains as it does its own."""

# B batch

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from txtrain.model import build
from txtrain.model.config import ModelConfig
from txtrain.model.head.loss import IGNORED, cross_entropy
from txtrain.model.inputs import LABELS, require
from txtrain.model.output import ModelOutput
from txtrain.model.transformer import Transformer


class SentencePairTransformer(Transformer):
    """With a head that tells whether the second sentence follows the first (BERT).

    A class of its own: the Trainer takes every parameter of forward with "label" in its name for one that each batch has.
    """

    def forward(self, *inputs: Any, next_sentence_label: Tensor | None = None, **named: Any) -> ModelOutput:
        """As `Transformer.forward`. next_sentence_label: [B]; 0 if the second sentence follows the first, 1 if not. Its loss is added."""
        out = super().forward(*inputs, **named)
        if next_sentence_label is not None:
            assert out.nsp_logits is not None
            require("next_sentence_label", next_sentence_label, {"B": len(out.nsp_logits)}, LABELS)
            loss = cross_entropy(out.nsp_logits, next_sentence_label, (next_sentence_label != IGNORED).sum())
            out.loss = loss if out.loss is None else out.loss + loss
        return out


# What the Trainer and collators look at: the parameters of the one, and the label of the other.
_LABEL = inspect.Parameter("next_sentence_label", inspect.Parameter.KEYWORD_ONLY, default=None)
_KNOWN = inspect.signature(Transformer.forward)
SentencePairTransformer.forward.__signature__ = _KNOWN.replace(  # type: ignore[attr-defined]
    parameters=[*_KNOWN.parameters.values(), _LABEL]
)


def build_model(config: ModelConfig) -> Transformer:
    """The model that the config describes, initialised by the family's rule from torch's generator.

    Under `torch.device("meta")` it is only described: no memory, no values (`to_empty` and `init_weights` give them later).

    Raises:
        ConfigError: the config is none, or illegal.
    """
    return build.build_model(config, SentencePairTransformer)

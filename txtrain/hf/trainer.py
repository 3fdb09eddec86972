"""Models for `transformers.Trainer`."""

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
    """With a head that predicts whether the second sentence follows the first (BERT).

    A class of its own: the Trainer expects each parameter of forward named "...label..." in every batch.
    """

    def forward(self, *inputs: Any, next_sentence_label: Tensor | None = None, **named: Any) -> ModelOutput:
        """As `Transformer.forward`. next_sentence_label: [B], 0 if the second sentence follows; its loss is added. Of
        accumulated batches each counts by its share of the words: how many sentences they have is not told."""
        out = super().forward(*inputs, **named)
        if next_sentence_label is not None:
            assert out.nsp_logits is not None
            require("next_sentence_label", next_sentence_label, {"B": len(out.nsp_logits)}, LABELS)
            loss = cross_entropy(out.nsp_logits, next_sentence_label, (next_sentence_label != IGNORED).sum())
            labels, words = named.get("labels"), named.get("num_items_in_batch")
            share = 1.0 if labels is None or words is None else (labels != IGNORED).sum() / words
            out.loss = loss if out.loss is None else out.loss + loss * share
        return out


# What the Trainer and collators inspect.
_LABEL = inspect.Parameter("next_sentence_label", inspect.Parameter.KEYWORD_ONLY, default=None)
_KNOWN = inspect.signature(Transformer.forward)
SentencePairTransformer.forward.__signature__ = _KNOWN.replace(  # type: ignore[attr-defined]
    parameters=[*_KNOWN.parameters.values(), _LABEL]
)


def build_model(config: ModelConfig) -> Transformer:
    """The model of a config, initialised by the family's rule from torch's generator.

    Under `torch.device("meta")` it has no memory and no values; `to_empty` and `init_weights` add them later.

    Raises:
        ConfigError: it is no ModelConfig, or an illegal one.
    """
    return build.build_model(config, SentencePairTransformer)

"""Which options of a model go together: read by the model's check, by the tests, and by docs/axes.md. No torch.

What no rule excludes is legal: every position with every attention, norm, norm position and FFN, in every topology,
with windows and packed documents. `txtrain.config.compatibility` adds the rules of a run.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator, Mapping
from typing import Any

from txtrain.ground.unknown_keys import written

Choices = Mapping[str, Any]  # the configs: model, and in a run objective and data


@dc.dataclass(frozen=True)
class Rule:
    """Where each key of `given` has one of its values, `key` must have one of `allowed`, the nearest first."""

    given: Mapping[str, tuple[Any, ...]]
    key: str
    allowed: tuple[Any, ...]
    why: str

    def broken_by(self, choices: Choices) -> bool:
        applies = all(value_of(choices, key) in values for key, values in self.given.items())
        return applies and value_of(choices, self.key) not in self.allowed

    def sentence(self, choices: Choices, nearest: str | None = None) -> str:
        given = " and ".join(self.assignment(choices, key) for key in self.given)
        key, allowed, value = self.told(choices)
        near = nearest or self.nearest
        return f"`{key}` must be {allowed} with {given}, but is {value} instead: {self.why}. Nearest: {near}."

    def told(self, choices: Choices) -> tuple[str, str, str]:
        """The key, the allowed values and the present one, for the sentence."""
        return self.key, " or ".join(map(written, self.allowed)), written(value_of(choices, self.key))

    def assignment(self, choices: Choices, key: str) -> str:
        return f"{key}={written(value_of(choices, key))}"

    @property
    def nearest(self) -> str:
        return f"{self.key}={written(self.allowed[0])}"


_CLASS, _PATCH = {"model/head": ("class",)}, {"model/embedding": ("patch",)}
_ONE_STACK = {"model.topology": ("decoder", "encoder")}

MODEL_RULES = (
    Rule({"model/head": ("mlm",)}, "model.topology", ("encoder",), "a decoder has already read the token to predict"),
    Rule(
        {**_CLASS, "model.topology": ("decoder", "encoder_decoder")}, "model.head.pooling", ("last", "mean", None),
        "the first position of a decoder sees nothing but itself",
    ),
    Rule(_CLASS, "model.logit_softcap", (None,), "only logits over a vocabulary are capped"),
    Rule(_PATCH, "model.topology", ("encoder", "decoder"), "a decoder beside the encoder reads tokens"),
    Rule(_PATCH, "model/head", ("class", "none"), "patches have no vocabulary that a head could predict"),
    Rule(_PATCH, "model.tie_word_embeddings", (False,), "there is no token embedding to tie the head to"),
    Rule(_PATCH, "model.vocab_size", (0,), "patches have no vocabulary"),
    Rule(
        {"model.topology": ("encoder", "encoder_decoder")}, "model.mtp_depth", (0,),
        "multi-token prediction needs a decoder alone",
    ),
    Rule(_CLASS, "model.mtp_depth", (0,), "there are no further tokens to predict"),
    Rule(_ONE_STACK, "model.n_encoder_layers", (None,), "one stack has n_layers layers"),
    Rule(_ONE_STACK, "model.share_embeddings", (True,), "one stack has one embedding"),
)


def problems(model: Any) -> Iterator[str]:
    """Sentences for the rules that a model breaks."""
    choices = {"model": model}
    yield from (rule.sentence(choices) for rule in MODEL_RULES if rule.broken_by(choices))


def value_of(choices: Choices, key: str) -> Any:
    """The value at a key of the command line, which the chosen option must have; for a group the option's name."""
    value: Any = choices
    for part in key.replace("/", ".").split("."):
        value = value[part] if isinstance(value, Mapping) else getattr(value, part)
    is_option: bool = dc.is_dataclass(value)
    return value.type if is_option else value

"""What goes together within a model: rules of the axes, read where a model is described, by the tests, and by docs/axes.md. No torch.

Two options that no rule separates go together: every position with every attention, norm, norm position and FFN, in every topology,
windows and packed documents included. What a run adds to this table is `txtrain.config.compatibility`.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator, Mapping
from typing import Any

Choices = Mapping[str, Any]  # model, and where there is a run objective and data: their configs


@dc.dataclass(frozen=True)
class Rule:
    """Where each key of `given` has one of its values, the value of `key` must be one of `allowed`, the first of them the nearest.

    Keys are those of the command line.
    """

    given: Mapping[str, tuple[Any, ...]]
    key: str
    allowed: tuple[Any, ...]
    why: str

    def broken_by(self, choices: Choices) -> bool:
        return all(value_of(choices, k) in values for k, values in self.given.items()) and value_of(choices, self.key) not in self.allowed

    def sentence(self, choices: Choices, nearest: str | None = None) -> str:
        given = " and ".join(self.assignment(choices, key) for key in self.given)
        key, allowed, value = self.told(choices)
        return f"`{key}` must be {allowed} with {given}, but is {value} instead: {self.why}. Nearest: {nearest or self.nearest}."

    def told(self, choices: Choices) -> tuple[str, str, str]:
        """The key, the allowed values and the present one, as the sentence writes them."""
        return self.key, " or ".join(map(written, self.allowed)), written(value_of(choices, self.key))

    def assignment(self, choices: Choices, key: str) -> str:
        return f"{key}={written(value_of(choices, key))}"

    @property
    def nearest(self) -> str:
        return f"{self.key}={written(self.allowed[0])}"


MODEL_RULES = (
    Rule({"model/head": ("mlm",)}, "model.topology", ("encoder",), "it predicts each token at its own place, which a decoder has just read"),
    Rule({"model/head": ("class",)}, "model.topology", ("encoder", "decoder"), "one class answers one sequence, and two stacks read two"),
    Rule(
        {"model/head": ("class",), "model.topology": ("decoder",)},
        "model.head.pooling",
        ("last", "mean"),
        "the first position of a decoder sees nothing but itself",
    ),
    Rule({"model/head": ("class",)}, "model.logit_softcap", (None,), "only scores of a vocabulary are capped"),
    Rule({"model/embedding": ("patch",)}, "model.topology", ("encoder", "decoder"), "a decoder beside the encoder reads tokens"),
    Rule({"model/embedding": ("patch",)}, "model/head", ("class",), "patches have no vocabulary that a head could predict"),
    Rule({"model/embedding": ("patch",)}, "model.tie_word_embeddings", (False,), "there is no table of words to tie the head to"),
    Rule({"model/embedding": ("patch",)}, "model.vocab_size", (0,), "patches have no vocabulary"),
    Rule({"model.topology": ("encoder", "encoder_decoder")}, "model.mtp_depth", (0,), "further tokens are told from those before, in one sequence"),
    Rule({"model/head": ("class",)}, "model.mtp_depth", (0,), "there is no further token to tell"),
    Rule({"model.topology": ("decoder", "encoder")}, "model.n_encoder_layers", (None,), "one stack has n_layers layers"),
    Rule({"model.topology": ("decoder", "encoder")}, "model.share_embeddings", (True,), "one stack has one embedding"),
)


def problems(model: Any) -> Iterator[str]:
    """What does not go together within a model; finished sentences."""
    choices = {"model": model}
    yield from (rule.sentence(choices) for rule in MODEL_RULES if rule.broken_by(choices))


def value_of(choices: Choices, key: str) -> Any:
    """The value at a key of the command line, which the chosen option must have; of a group the option's name."""
    value: Any = choices
    for part in key.replace("/", ".").split("."):
        value = value[part] if isinstance(value, Mapping) else getattr(value, part)
    return value.type if dc.is_dataclass(value) else value


def written(value: object) -> str:
    """As on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

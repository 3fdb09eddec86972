"""Keys of the objectives that ask questions, for evaluate. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

from txtrain.objectives.base_config import ObjectiveConfig
from txtrain.registry import config, knob


@config
class QuestionsConfig(ObjectiveConfig):
    topologies: ClassVar = ("decoder", "encoder_decoder")
    heads: ClassVar = ("lm",)
    trains: ClassVar = False


@config
class MultipleChoiceConfig(QuestionsConfig):
    """The likeliest of several choices; for evaluate."""

    reads: ClassVar = ("choices",)


@config
class ClozeConfig(QuestionsConfig):
    """The end of a text; for evaluate."""

    reads: ClassVar[tuple[str, ...]] = ("cloze",)


@config
class AnswersConfig(QuestionsConfig):
    """Answers to questions, generated greedily; for evaluate."""

    reads: ClassVar = ("questions",)

    max_new_tokens: int = knob(64, at_least=1)
    stop: tuple[str, ...] = ("\n",)  # texts that end an answer
    # regular expression: of both texts its last match, or the match of its first group, is compared; null: all
    pattern: str | None = knob(None, literal=True)
    ignore_case: bool = False

    def check(self) -> Iterator[str]:
        try:
            re.compile(self.pattern or "")
        except re.error as e:
            yield f"`objective.pattern` must be a regular expression, but is {self.pattern!r} instead: {e}."

"""Keys of questions, for evaluate, and of problems. No torch."""

from __future__ import annotations

from typing import ClassVar

from txtrain.data.base_config import DataConfig, TextsConfig, UnpackedConfig
from txtrain.registry import config, knob


@config
class QuestionsConfig(UnpackedConfig, TextsConfig):
    """Keys of every source of questions, for `evaluate`."""

    # .jsonl, .json or .parquet files, globs, folders, or a list of them.
    path: str | tuple[str, ...] | None = knob(None, literal=True)
    question_column: str = "question"
    prompt: str | None = knob(None, literal=True)  # what the model reads: text with {COLUMN}s; null: the question
    separator: str = " "  # between the prompt and what follows it


@config
class MultipleChoiceConfig(QuestionsConfig):
    """`data=multiple_choice`: questions with several choices, of which one is right."""

    kind: ClassVar = "choices"

    choices_column: str = "choices"  # a list of texts, or {"text": [...], "label": [...]}
    answer_column: str = "answer"  # the number of the right choice, from 0 on; the choice itself; or its label
    # Text in the prompt that each choice replaces; what follows it is scored.
    blank: str | None = None


@config
class ClozeConfig(QuestionsConfig):
    """`data=cloze`: texts whose end is asked for."""

    kind: ClassVar = "cloze"

    question_column: str = "text"
    answer_column: str | None = None  # null: the last word of the text


@config
class AnsweredConfig(QuestionsConfig):
    """`data=questions`: questions and answers."""

    kind: ClassVar = "questions"

    answer_column: str = "answer"


@config
class ProblemsConfig(UnpackedConfig):
    """`data=problems`: questions and answers in files."""

    kind: ClassVar = "problems"

    # Files (.json, .jsonl, .parquet), globs, folders, or a list of them.
    path: str | tuple[str, ...] | None = knob(None, literal=True)
    val_path: str | tuple[str, ...] | None = None
    question_column: str | tuple[str, ...] = "question"  # several are joined by a space
    answer_column: str = "answer"
    # of samples that `predict` has written: rows with a lower `reward` are left out, and equal ones count once
    min_reward: float | None = None
    max_text_bytes: int = knob(1 << 31, at_least=1, free=True)  # largest size of a row


@config
class ArithmeticConfig(DataConfig):
    """`data=arithmetic`: chains such as 7+3*4-2=, from left to right, modulo 10. No files."""

    kind: ClassVar = "problems"

    difficulty: int = knob(5, at_least=1, at_most=64)  # operations in a chain
    n_train: int = knob(20_000, at_least=1)  # distinct problems
    n_val: int = knob(500, at_least=1)  # held out by a hash of the problem
    # share of the demonstrations (objective=sft) that write the running values; the others write the answer alone
    worked: float = knob(1.0, at_least=0, at_most=1)


@config
class CountdownConfig(DataConfig):
    """`data=countdown`: numbers, and a target to be made of them. No files."""

    kind: ClassVar = "problems"

    difficulty: int = knob(3, at_least=2, at_most=8)  # how many numbers
    n_train: int = knob(20_000, at_least=1)  # distinct problems
    n_val: int = knob(500, at_least=1)  # held out by a hash of the problem

"""data=multiple_choice, cloze, questions: a question in each row of a file, and its answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from txtrain.data.sources.documents import objects_of
from txtrain.data.sources.files import Limits, files_identity, find_files
from txtrain.data.sources.source import Split
from txtrain.errors import ConfigError, hint, shorten

KINDS = (".jsonl", ".json", ".parquet")
_FIELD = re.compile(r"\{(\w+)\}")


class Question(NamedTuple):
    """A prompt and texts that may follow it.

    Attributes:
        options: of each, (what precedes, what is scored); a single one if the answer is known alone.
        n_bytes: of each option's own text, in UTF-8.
        answer: number of the right option; None: unknown.
    """

    options: tuple[tuple[str, str], ...]
    n_bytes: tuple[int, ...]
    answer: int | None


class QuestionFiles:
    """Rows of .jsonl, .json or .parquet.

    Args:
        prompt: what the model reads, with {COLUMN} for values of the row; None: the question.
        separator: between a prompt and what follows it.

    Raises:
        ConfigError: no such file.
    """

    def __init__(
        self, path: str | tuple[str, ...] | None, question_column: str, answer_column: str | None, prompt: str | None,
        separator: str, max_expansion: float, max_text_bytes: int, encoding_errors: str, bad_rows: str,
    ) -> None:
        if not path:
            raise ConfigError("`data.path` must be given: a .jsonl, .json or .parquet file of questions.")
        self.path, self.question_column, self.answer_column = path, question_column, answer_column
        self.prompt, self.separator = prompt, separator
        self.skipped: dict[str, str] | None = {} if bad_rows == "skip" else None
        self.limits = Limits(max_expansion, max_text_bytes, encoding_errors, self.skipped)
        self.files = find_files(path, "data.path", KINDS, "questions")

    def questions(self, split: Split) -> Iterator[Question]:
        for file in self.files:
            for where, row in objects_of(file, "data.path", self.limits):
                with self.limits.row(where):
                    made = self.question(row, where)
                    yield made

    def question(self, row: Mapping[str, Any], where: str) -> Question:
        """Of a row. where: its place, for errors."""
        answer = None if self.answer_column is None else row.get(self.answer_column)
        text = self.written(row, where)
        if answer is None:
            return Question(((text, ""),), (0,), None)
        if not isinstance(answer, str | int | float):  # of a list no answer would ever be equal
            raise ConfigError(f"`data.answer_column` must name a text, but that of {where} is {shorten(repr(answer))}.")
        said = answer if isinstance(answer, str) else str(answer)
        return Question(((text, self.separator + said),), (len(said.encode()),), 0)

    def written(self, row: Mapping[str, Any], where: str) -> str:
        """The prompt of a row."""
        if self.prompt is None:
            return self.text(row, self.question_column, "question_column", where)
        return _FIELD.sub(lambda m: self.text(row, m[1], "prompt", where), self.prompt)

    def text(self, row: Mapping[str, Any], column: str, key: str, where: str) -> str:
        value = _value(row, column, key, where)
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            said = shorten(repr(value))
            raise ConfigError(f"`data.{key}` must name a text, but {column} in {where} is {said} instead.")
        return str(value)

    def identity(self) -> str:
        told = self.question_column, self.answer_column, self.prompt, self.separator
        return f"questions 1 {self.limits.identity}{told} {files_identity(self.files)}"

    def describe(self) -> str:
        return f"questions of {self.path if isinstance(self.path, str) else ', '.join(self.path)}"


class Cloze(QuestionFiles):
    """A text whose end is asked for: the answer's column, or the last word (LAMBADA: 1606.06031)."""

    def question(self, row: Mapping[str, Any], where: str) -> Question:
        if self.answer_column is not None:
            _value(row, self.answer_column, "answer_column", where)
            return super().question(row, where)
        before, space, last = self.written(row, where).rstrip().rpartition(" ")
        if not before.strip():
            raise ConfigError(f"`data.question_column` must have texts of at least two words, but {where} has fewer.")
        return Question(((before, space + last),), (len(last.encode()),), 0)


class MultipleChoice(QuestionFiles):
    """Choices, of which one is right.

    Args:
        choices_column: of a list of texts, or of {"text": [...], "label": [...]}.
        answer_column: of the number of the right choice from 0 on, the choice itself, or its label.
        blank: text in the prompt that each choice replaces. What follows it is scored (Trinh and Le 2018, 1806.02847);
            if nothing does, or without a blank, the choice.
    """

    def __init__(
        self, path: str | tuple[str, ...] | None, question_column: str, answer_column: str | None, prompt: str | None,
        separator: str, max_expansion: float, max_text_bytes: int, encoding_errors: str, bad_rows: str,
        choices_column: str, blank: str | None,
    ) -> None:
        super().__init__(
            path, question_column, answer_column, prompt, separator, max_expansion, max_text_bytes, encoding_errors,
            bad_rows,
        )
        self.choices_column, self.blank = choices_column, blank

    def question(self, row: Mapping[str, Any], where: str) -> Question:
        found = _value(row, self.choices_column, "choices_column", where)
        choices, labels = (found.get("text"), found.get("label")) if isinstance(found, dict) else (found, None)
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) for one in choices):
            said = shorten(repr(found))
            raise ConfigError(f"`data.choices_column` must hold at least two texts, but that of {where} is {said}.")
        assert self.answer_column is not None
        answer = _value(row, self.answer_column, "answer_column", where)
        number = _number(answer, choices, labels if isinstance(labels, list) else [])
        if number is None:
            allowed = f"a number from 0 to {len(choices) - 1}, or one of the choices or their labels"
            said = shorten(repr(answer))
            raise ConfigError(f"`data.answer_column` must hold {allowed}, but that of {where} is {said} instead.")
        options = tuple(self._option(self.written(row, where), choice) for choice in choices)
        return Question(options, tuple(len(scored.strip().encode()) for _, scored in options), number)

    def _option(self, prompt: str, choice: str) -> tuple[str, str]:
        if self.blank is None or self.blank not in prompt:
            return prompt, self.separator + choice
        before, _, after = prompt.partition(self.blank)
        return (before + choice, after) if after.strip() else (before, choice)

    def identity(self) -> str:
        return f"{super().identity()} {self.choices_column} {self.blank}"


def _value(row: Mapping[str, Any], column: str, key: str, where: str) -> Any:
    if column not in row:
        names = shorten(", ".join(row)) or "(there is none)"
        raise ConfigError(
            f"`data.{key}` must be one of {names} for {where}, but is {column} instead.{hint(column, list(row))}"
        )
    return row[column]


def _number(answer: Any, choices: list[str], labels: list[Any]) -> int | None:
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(choices) and not labels else _place(answer, labels)
    found = _place(answer, choices)
    if found is None:
        found = _place(answer, labels)
    if found is None and isinstance(answer, str) and re.fullmatch(r"\d{1,9}", answer) and int(answer) < len(choices):
        found = int(answer)
    return found


def _place(value: Any, among: list[Any]) -> int | None:
    return among.index(value) if among.count(value) == 1 else None

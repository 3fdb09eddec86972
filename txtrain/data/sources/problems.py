"""data=problems: questions and answers in files, such as GSM8K's and SVAMP's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from txtrain.data.sources.documents import objects_of
from txtrain.data.sources.files import Limits, files_identity, find_files
from txtrain.data.sources.origins import refuse_shared
from txtrain.data.sources.source import Problem, Split, side_of
from txtrain.errors import ConfigError, hint

KINDS = (".json", ".jsonl", ".parquet")
Paths = str | tuple[str, ...]


class Problems:
    """One problem per row. Without val_path, problems are held out by a hash of the question: equal ones are on one
    side.

    Args:
        path, val_path: files, globs, folders, or a list of them.
        question_column: of the question; several columns are joined by a space.
        min_reward: rows with a lower `reward` are left out, and each question with the same answer counts once.

    Raises:
        ConfigError: a path does not exist, or a file is in both path and val_path.
    """

    has_validation = True

    def __init__(
        self, path: Paths | None, val_path: Paths | None, question_column: str | tuple[str, ...], answer_column: str,
        val_fraction: float, max_expansion: float, max_text_bytes: int, min_reward: float | None = None,
    ) -> None:
        if not path:
            raise ConfigError("`data.path` must be given with data=problems: .json, .jsonl or .parquet files.")
        columns = (question_column,) if isinstance(question_column, str) else question_column
        self.path, self.questions, self.answer, self.val_fraction = path, columns, answer_column, val_fraction
        self.limits, self.min_reward = Limits(max_expansion, max_text_bytes), min_reward
        self.files: dict[str, list[Path]] = {"data.path": find_files(path, "data.path", KINDS, "problems")}
        if val_path:
            self.files["data.val_path"] = find_files(val_path, "data.val_path", KINDS, "problems")
            refuse_shared(self.files["data.path"], self.files["data.val_path"])
        for key, files in self.files.items():
            for file in files:
                if not file.name.removesuffix(".gz").removesuffix(".zst").endswith(KINDS):
                    raise ConfigError(f"`{key}` must be {', '.join(KINDS)} files of problems, but {file} is another.")

    def problems(self, split: Split) -> Iterator[Problem]:
        divides, seen = len(self.files) == 1, set[tuple[str, str]]()
        key = "data.val_path" if split == "validation" and not divides else "data.path"
        for file in self.files[key]:
            for where, row in objects_of(file, key, self.limits):
                question = " ".join(self._text(row, name, "question_column", where) for name in self.questions)
                if divides and side_of(question, self.val_fraction) != split:
                    continue
                if self.min_reward is not None and self._reward(row, where) < self.min_reward:
                    continue  # it may well be empty
                answer = self._text(row, self.answer, "answer_column", where)
                if self.min_reward is not None:
                    if (question, answer) in seen:
                        continue
                    seen.add((question, answer))
                yield {"question": question, "answer": answer}

    def _text(self, row: dict[str, object], name: str, key: str, where: str) -> str:
        """Raises ConfigError: the row has no such column, or neither text nor a number in it."""
        if name not in row:
            raise ConfigError(
                f"`data.{key}` must be a column of the rows ({', '.join(row)}), but is {name} instead, which {where} "
                f"lacks.{hint(name, row)}"
            )
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            raise ConfigError(f"`data.{key}`: {name!r} must be a text or a number, but is {value!r} in {where}.")
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

    def _reward(self, row: dict[str, object], where: str) -> float:
        value = row.get("reward")
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            said = f"but is {value!r} in {where}: txtrain predict writes it. Without it: data.min_reward=null"
            raise ConfigError(f"`data.min_reward` must be null, or each row have a number `reward`, {said}.")
        return value

    def identity(self) -> str:
        known = " ".join(files_identity(files) for files in self.files.values())
        share = self.val_fraction if len(self.files) == 1 else None
        least = "" if self.min_reward is None else f" {self.min_reward}"
        return f"problems 1 {self.questions} {self.answer} {share} {known}{least}"

    def describe(self) -> str:
        return f"problems of {self.path if isinstance(self.path, str) else ', '.join(self.path)}"

"""data=translation: sentence pairs in .tsv files, in two aligned files, or in a set for `load_dataset`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from txtrain.data.sources.documents import rows_of, rows_of_set
from txtrain.data.sources.files import Limits, find_files, text_chunks
from txtrain.data.sources.hub import load_dataset, set_errors
from txtrain.data.sources.origins import Origins
from txtrain.data.sources.source import Split
from txtrain.errors import ConfigError, hint, shorten
from txtrain.ground.plain_files import split_lines

Pairs = Callable[[], Iterator[tuple[str, str]]]
Picker = Callable[[Any], tuple[Any, Any]]

_TSV = (".tsv", ".tsv.gz")
_ONCE_CUT = re.compile(r"[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")  # where version 0.1.0 ended a line too


class Translation:
    """One pair per row.

    Args:
        path, val_path: a .tsv; or source sentences, with target_path, val_target_path line by line; or a name or a file
            for load_dataset. Files may be .gz.
        columns: of a .tsv or a set; null: the last two of a .tsv, and the two of a set or of its `translation`.
        swap: exchange source and target.

    Raises:
        ConfigError: a file or set does not exist, is not of such pairs, or validation rows are also training rows.
    """

    def __init__(
        self,
        path: str | None,
        target_path: str | None,
        val_path: str | None,
        val_target_path: str | None,
        name: str | None,
        split: str,
        val_split: str | None,
        columns: tuple[str, str] | tuple[int, int] | None,
        swap: bool,
        max_expansion: float = Limits().max_expansion,
        max_text_bytes: int = Limits().max_text_bytes,
        encoding_errors: str = Limits().encoding_errors,
        bad_rows: str = "refuse",
    ) -> None:
        if not path:
            raise ConfigError(
                "`data.path` must be given with data=translation: a .tsv, a file of sources beside data.target_path, "
                "or a hub set."
            )
        self.path, self.columns, self.swap = path, columns, swap
        self.skipped: dict[str, str] | None = {} if bad_rows == "skip" else None
        self.limits = Limits(max_expansion, max_text_bytes, encoding_errors, self.skipped)
        self._origins = Origins()
        self.rows: dict[Split, Pairs] = {"train": self._open(path, target_path, "data.path", name, split)}
        if val_path or val_split:
            key = "data.val_path" if val_path else "data.val_split"
            self.rows["validation"] = self._open(val_path or path, val_target_path, key, name, val_split or split)
        self.has_validation = "validation" in self.rows

    def pairs(self, split: Split) -> Iterator[tuple[str, str]]:
        return ((b, a) for a, b in self.rows[split]()) if self.swap else self.rows[split]()

    def identity(self) -> str:
        return f"{self.limits.identity}translation {self.columns} {self.swap} {' '.join(self._origins.known)}"

    def describe(self) -> str:
        return f"pairs of {self.path}{', swapped' if self.swap else ''}"

    # ------------------------------------------------------------------------------------------------------------- open

    def _open(self, path: str, target_path: str | None, key: str, name: str | None, split: str) -> Pairs:
        if target_path:
            return self._aligned(
                self._file(path, key), self._file(target_path, key.replace("path", "target_path")), key
            )
        if path.endswith(_TSV):
            file = self._file(path, key)
            self._origins.add_files([file], key)
            return lambda: _tsv(file, self.columns, key, self.limits)
        return self._set(path, key, name, split)

    @staticmethod
    def _file(path: str, key: str) -> Path:
        (file,) = find_files((path,), key)
        return file

    def _aligned(self, source: Path, target: Path, key: str) -> Pairs:
        texts = ["".join(text_chunks(file, key, self.limits)) for file in (source, target)]
        sides = [split_lines(text) for text in texts]
        if len(sides[0]) != len(sides[1]):
            raise ConfigError(
                f"`{key}` must be two files with the same number of lines, "
                f"but {source} has {len(sides[0])} and {target} has {len(sides[1])}."
            )
        self._origins.add_files([source, target], key)
        if any(map(_ONCE_CUT.search, texts)):
            self._origins.known.append("lines")  # not what an older cache holds
        return lambda: zip(*sides, strict=True)

    def _set(self, path: str, key: str, name: str | None, split: str) -> Pairs:
        allowed = "a .tsv, a file of sources beside data.target_path, or what load_dataset takes"
        remedy = "A .tsv, or a file of sources with data.target_path beside it, needs no hub."
        with set_errors(key, path, split, allowed, remedy):
            rows = load_dataset(path, name, split)
        pick = _picker(rows, self.columns, path)
        self._origins.add_set(path, name, split, rows, key)
        return lambda: _rows(rows, pick, path, key, self.limits)


def _tsv(file: Path, columns: Any, key: str, limits: Limits) -> Iterator[tuple[str, str]]:
    wanted = columns or (-2, -1)
    if not all(isinstance(c, int) for c in wanted):
        raise ConfigError(
            f"`data.columns` must be two numbers from 0 on for {file.name}, but is {list(wanted)} instead."
        )
    return rows_of(file, key, limits, partial(_of_tsv, columns, wanted, key))


def _of_tsv(columns: Any, wanted: Any, key: str, line: str, where: str) -> tuple[str, str]:
    cells = line.removesuffix("\n").removesuffix("\r").split("\t")
    needed = max(2, *(c + 1 if c >= 0 else -c for c in wanted))  # -1: the last
    if len(cells) < needed or (columns is None and len(cells) > 3):
        allowed = "2 or 3 columns, or data.columns=[i,j] told," if columns is None else f"at least {needed} columns"
        raise ConfigError(f"`{key}` must have {allowed} in each line, but {where} has {len(cells)}.")
    return cells[wanted[0]], cells[wanted[1]]


def _rows(rows: Any, pick: Picker, path: str, key: str, limits: Limits) -> Iterator[tuple[str, str]]:
    for where, row in rows_of_set(rows, path, key, limits):
        pair = pick(row)
        if bad := [text for text in pair if not isinstance(text, str)]:
            with limits.row(where):
                raise ConfigError(f"`{key}` must be pairs of texts, but {where} has {shorten(repr(bad[0]))}.")
        else:
            yield pair


def _picker(rows: Any, columns: Any, path: str) -> Picker:
    """A function of a row that gives its two texts: of its `translation` (a text per language), or of two columns."""
    nested = "translation" in rows.column_names
    names = list(rows[0]["translation"]) if nested else list(rows.column_names)
    first, second = wanted = columns or (tuple(names) if len(names) == 2 else ("", ""))
    for column in wanted:
        if column not in names:
            raise ConfigError(
                f"`data.columns` must be two of {', '.join(names)} for {path}, "
                f"but is {columns or 'null'} instead.{hint(column, names)}"
            )
    return (
        (lambda row: (row["translation"][first], row["translation"][second]))
        if nested
        else (lambda row: (row[first], row[second]))
    )

"""data=labels: texts, or pairs of texts, with a class, several classes or numbers for each."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from txtrain.data.sources.documents import objects_of, rows_of_set
from txtrain.data.sources.files import (
    Limits,
    find_files,
    listed,
    open_unpacked,
    unpacked_name,
)
from txtrain.data.sources.hub import load_dataset, set_errors
from txtrain.data.sources.origins import Origins
from txtrain.data.sources.source import Split
from txtrain.errors import ConfigError, hint, shorten

FORMAT = "labels 1"  # part of fingerprints: raise it when texts or labels change
DELIMITERS = {".csv": ",", ".tsv": "\t"}
KINDS = (*DELIMITERS, ".jsonl", ".json", ".parquet")
_INTEGER = re.compile(r"[+-]?\d{1,40}")  # of more digits it is a name, as Python converts no more than 4,300
_NUMBER = re.compile(r"[+-]?(\d+\.\d*|\.\d+)(e[+-]?\d+)?|[+-]?\d+e[+-]?\d+", re.I)
_FLAGS = {"0": 0, "1": 1, "false": 0, "true": 1, "0.0": 0, "1.0": 1}

Paths = str | tuple[str, ...]
Row = tuple[str, Mapping[str, Any]]  # its place, and its cells by column
Label = int | tuple[float, ...]  # the number of the class; or a number for each class or column


class Labelled(NamedTuple):
    """One row. label: the number of its class; of `multi` 0 or 1 for each class; of a regression the numbers."""

    texts: tuple[str, ...]  # one, or two of a pair
    label: Label


class LabelledTexts:
    """Texts with labels, in .csv, .tsv, .jsonl, .json or .parquet files, or in a set for load_dataset.

    Args:
        label_column: the class or the number; `multi`: columns of 0 and 1, whose names are the classes, or one column
            of lists of names. Several columns of a regression are several numbers.
        label_names: the classes in order; empty: those of the training rows, sorted.

    Raises:
        ConfigError: a path or a column does not exist, or validation rows are also training rows.
    """

    def __init__(
        self, path: Paths | None, val_path: Paths | None, text_column: str, text_pair_column: str | None,
        label_column: str | tuple[str, ...], kind: str, label_names: tuple[str, ...], delimiter: str | None,
        name: str | None, split: str, val_split: str | None, max_expansion: float, max_text_bytes: int,
        encoding_errors: str, bad_rows: str,
    ) -> None:
        if not path:
            raise ConfigError("`data.path` must be given with data=labels: .csv, .tsv or .jsonl files, or a hub set.")
        self.path, self.kind, self.delimiter, self.given = path, kind, delimiter, label_names
        self.texts = (text_column, *([] if text_pair_column is None else [text_pair_column]))
        self.columns = (label_column,) if isinstance(label_column, str) else label_column
        self.listed = kind == "multi" and isinstance(label_column, str)
        self.skipped: dict[str, str] | None = {} if bad_rows == "skip" else None
        self.limits = Limits(max_expansion, max_text_bytes, encoding_errors, self.skipped)
        self._origins = Origins()
        self._names_of_set: tuple[str, ...] = ()
        self.rows: dict[Split, Callable[[], Iterable[Row]]] = {"train": self._open(path, "data.path", name, split)}
        if val_path or val_split:
            key = "data.val_path" if val_path else "data.val_split"
            self.rows["validation"] = self._open(val_path or path, key, name, val_split or split)
        self.has_validation = "validation" in self.rows

    def labelled(self, split: Split) -> Iterator[Labelled]:
        numbers = {name: i for i, name in enumerate(self.label_names)}
        for where, row in self.rows[split]():
            made = None
            with self.limits.row(where):
                made = Labelled(self._texts(row, where), self._label(row, where, numbers))
            if made is not None:
                yield made

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        """The classes' names, or those of several numbers."""
        if self.kind == "regression" or (self.kind == "multi" and not self.listed):
            return self.columns if len(self.columns) > 1 or self.kind == "multi" else ()
        if known := self.given or self._names_of_set:
            return known
        found: dict[str, None] = {}
        for where, row in self.rows["train"]():
            with self.limits.row(where):
                found |= dict.fromkeys(self._classes(row, where))
        return tuple(sorted(found, key=_in_order))

    @property
    def n_classes(self) -> int:
        return len(self.label_names) or 1

    def identity(self) -> str:
        said = self.texts, self.columns, self.kind, self.label_names, self.delimiter
        return f"{FORMAT} {self.limits.identity}{said} {' '.join(self._origins.known)}"

    def describe(self) -> str:
        where = self.path if isinstance(self.path, str) else ", ".join(self.path)
        what = {"single": "one", "multi": "any", "regression": "numbers"}[self.kind]
        of = f"{what} of {self.n_classes} classes" if self.kind != "regression" else what
        return f"{'pairs of texts' if len(self.texts) > 1 else 'texts'} of {where} with {of}"

    # ------------------------------------------------------------------------------------------------------------ cells

    def _cell(self, row: Mapping[str, Any], column: str, where: str, key: str) -> Any:
        if column not in row:
            raise ConfigError(_no_column(key, column, list(row), where))
        value = row[column]
        if value is None or (isinstance(value, str) and not value.strip()):
            empty = "null" if value is None else "empty"
            raise ConfigError(f"`{key}`: {column} in {where} must hold something, but is {empty}. {_SKIP}")
        return value

    def _texts(self, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
        found = []
        for key, column in zip(("data.text_column", "data.text_pair_column"), self.texts, strict=False):
            text = self._cell(row, column, where, key)
            if not isinstance(text, str):
                raise ConfigError(f"`{key}` must hold text, but {column} in {where} is {shorten(repr(text))}.")
            self.limits.check_text(len(text), where, key)
            found.append(text)
        return tuple(found)

    def _label(self, row: Mapping[str, Any], where: str, numbers: Mapping[str, int]) -> Label:
        if self.kind == "regression":
            return tuple(self._number(row, column, where) for column in self.columns)
        if self.kind == "multi" and not self.listed:
            return tuple(self._flag(row, column, where) for column in self.columns)
        chosen = [self._index(name, where, numbers) for name in self._classes(row, where)]
        return chosen[0] if self.kind == "single" else tuple(float(i in chosen) for i in range(len(numbers)))

    def _classes(self, row: Mapping[str, Any], where: str) -> list[str]:
        """The names of a row's classes as they are written."""
        (column,) = self.columns
        if not self.listed:
            return [self._class(self._cell(row, column, where, "data.label_column"), column, where)]
        values = row[column] if column in row else self._cell(row, column, where, "data.label_column")
        if not isinstance(values, list | tuple):
            columns = "a list of columns of 0 and 1, or the name of a column of lists, with data.kind=multi"
            said = f"{column} in {where} holds {shorten(repr(values))}"
            raise ConfigError(f"`data.label_column` must be {columns}, but {said}.")
        return [self._class(value, column, where) for value in values]

    @staticmethod
    def _class(value: Any, column: str, where: str) -> str:
        number = isinstance(value, float) or (isinstance(value, str) and _NUMBER.fullmatch(value.strip()))
        if number or not isinstance(value, str | int):
            remedy = " For numbers: data.kind=regression." if number else ""
            allowed = "classes, which are names or integers"
            raise ConfigError(
                f"`data.label_column` must hold {allowed}, but {column} in {where} is {shorten(repr(value))}.{remedy}"
            )
        return value.strip() if isinstance(value, str) else str(value)

    def _index(self, name: str, where: str, numbers: Mapping[str, int]) -> int:
        if name in numbers:
            return numbers[name]
        by_number = _INTEGER.fullmatch(name) and not any(map(_INTEGER.fullmatch, numbers))
        if by_number and 0 <= int(name) < len(numbers):
            return int(name)  # rows may hold numbers of named classes
        of = "of the training rows, of data.label_names or of the model"
        raise ConfigError(
            f"`data.label_column` must hold one of the classes {shorten(', '.join(numbers))} ({of}), "
            f"but {self.columns[0]} in {where} is {shorten(repr(name))}.{hint(name, numbers)}"
        )

    def _number(self, row: Mapping[str, Any], column: str, where: str) -> float:
        value = self._cell(row, column, where, "data.label_column")
        try:
            found = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            said = f"{column} in {where} is {shorten(repr(value))}"
            raise ConfigError(f"`data.label_column` must hold numbers with data.kind=regression, but {said}.")
        return found

    def _flag(self, row: Mapping[str, Any], column: str, where: str) -> float:
        value = self._cell(row, column, where, "data.label_column")
        found = _FLAGS.get(str(value).strip().lower())
        if found is None:
            said = f"{column} in {where} is {shorten(repr(value))}"
            raise ConfigError(f"`data.label_column` must hold 0 and 1 in its columns with data.kind=multi, but {said}.")
        return float(found)

    # ------------------------------------------------------------------------------------------------------------- open

    @property
    def _wanted(self) -> Iterator[tuple[str, str]]:
        yield from zip(("data.text_column", "data.text_pair_column"), self.texts, strict=False)
        yield from (("data.label_column", column) for column in self.columns)

    def _open(self, path: Paths, key: str, name: str | None, split: str) -> Callable[[], Iterable[Row]]:
        names = listed(path)
        if len(names) == 1 and not _is_local(names[0]):
            return self._set(names[0], key, name, split)
        files = find_files(path, key, KINDS, "labelled texts")
        self._origins.add_files(files, key)
        for file in files:
            first = next(iter(self._rows(file, key)), None)
            if first is None:
                raise ConfigError(f"`{key}`: {file} must hold rows, but has none{_header(file)}.")
            for column_key, column in self._wanted:
                if column not in first[1]:
                    raise ConfigError(_no_column(column_key, column, list(first[1]), str(file)))
        return lambda: (row for file in files for row in self._rows(file, key))

    def _rows(self, file: Path, key: str) -> Iterator[Row]:
        name = unpacked_name(file)
        suffix = next((end for end in KINDS if name.lower().endswith(end)), None)
        if suffix in DELIMITERS or self.delimiter is not None:
            return table_rows(file, key, self.delimiter or DELIMITERS[suffix or ".csv"], self.limits)
        if suffix is None:
            raise ConfigError(
                f"`{key}` must be {', '.join(KINDS)} files, but {file} is another. For a table: data.delimiter=';'."
            )
        return objects_of(file, key, self.limits)

    def _set(self, path: str, key: str, name: str | None, split: str) -> Callable[[], Iterable[Row]]:
        with set_errors(key, path, split, "files of labelled texts or what load_dataset takes"):
            rows = load_dataset(path, name, split)
        for column_key, column in self._wanted:
            if column not in rows.column_names:
                raise ConfigError(_no_column(column_key, column, rows.column_names, path))
        kind = rows.features[self.columns[0]]
        self._names_of_set = tuple(getattr(getattr(kind, "feature", kind), "names", None) or ())  # of a ClassLabel
        self._origins.add_set(path, name, split, rows, key)
        return lambda: rows_of_set(rows, path, key, self.limits)


_SKIP = "data.bad_rows=skip leaves such rows out, and lists them."


def table_rows(file: Path, key: str, delimiter: str, limits: Limits) -> Iterator[Row]:
    """The rows of a .csv or .tsv with the names of its columns in the first line; cells may be quoted (RFC 4180).

    Raises:
        ConfigError: names repeat, a row has another number of cells, a quote does not end, or it is not UTF-8.
    """
    with open_unpacked(file, key, limits) as raw:
        before, limit = csv.field_size_limit(), min(limits.max_text_bytes, (1 << 31) - 1)
        text = io.TextIOWrapper(raw, "utf-8-sig", limits.encoding_errors, newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        names: list[str] | None = None
        line = 0
        while True:
            where = f"line {line + 1} of {file}"
            try:
                csv.field_size_limit(limit)  # of the process, so only while a row is read
                cells = next(reader, None)
            except UnicodeDecodeError as e:
                remedy = "data.encoding_errors=replace puts \ufffd there"
                said = f"from {where} on it is not: byte 0x{e.object[e.start]:02x}"
                raise ConfigError(f"`{key}` must be text in UTF-8, but {said}. {remedy}.") from e
            except csv.Error as e:
                remedy = "a cell with a quote must be quoted, and its quotes doubled"
                raise ConfigError(f"`{key}` must be a table, but {where} cannot be read: {e}: {remedy}.") from e
            finally:
                csv.field_size_limit(before)
            line = reader.line_num
            if cells is None:
                return
            if any("\0" in cell for cell in cells):
                raise ConfigError(f"`{key}` must be text, but {where} holds a byte 0x00, as binary files do.")
            if not cells:
                continue  # a blank line
            if names is None:
                names = [name.strip() for name in cells]
                if twice := [name for name in names if names.count(name) > 1]:
                    differ = f"the columns of {file} must have different names"
                    raise ConfigError(f"`{key}`: {differ}, but {twice[0]!r} repeats.")
            else:
                made = None
                with limits.row(where):
                    if len(cells) != len(names):
                        wanted = f"{len(names)} cells in each row, as in its first line"
                        raise ConfigError(f"`{key}` must have {wanted}, but {where} has {len(cells)}.")
                    made = dict(zip(names, cells, strict=True))
                if made is not None:
                    yield where, made


def _header(file: Path) -> str:
    return " below its line of column names" if unpacked_name(file).endswith(tuple(DELIMITERS)) else ""


def _no_column(key: str, column: str, columns: Sequence[str], where: str) -> str:
    known = shorten(", ".join(columns))
    return f"`{key}` must be a column of {where} ({known}), but is {column} instead.{hint(column, columns)}"


def _is_local(name: str) -> bool:
    """Whether a name is a path or a glob, and not NAME or OWNER/NAME on the hub."""
    plain = unpacked_name(Path(name)).lower()
    return (
        name.startswith((".", "/", "~")) or name.count("/") > 1 or plain.endswith(KINDS) or bool(set(name) & set("[*?"))
        or Path(name).is_file()
    )


def _in_order(name: str) -> tuple[bool, int, str]:
    """Integers by value, before names."""
    whole = _INTEGER.fullmatch(name) is not None
    return not whole, int(name) if whole else 0, name

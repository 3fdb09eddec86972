"""data=hf: a text column of a set for `datasets.load_dataset`."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from txtrain.data.sources.documents import decoded, texts_of
from txtrain.data.sources.files import Limits, Skipped, files_identity
from txtrain.data.sources.hub import load_dataset, set_errors
from txtrain.data.sources.origins import Origins, names_of
from txtrain.data.sources.source import Split
from txtrain.data.store.split import is_held_out
from txtrain.errors import ConfigError, hint

_TOGETHER = 256  # rows of a stream that are read at once

_NO_PATH = "`data.path` must be given with data=hf: a name on the hub, or a local folder, as load_dataset takes it."


def hub_source(
    path: str | None, name: str | None, split: str, val_split: str | None, val_path: str | None, text_column: str,
    streaming: bool, val_fraction: float, max_text_bytes: int, encoding_errors: str, bad_rows: str,
    stream_readers: int = 1,
) -> HubDataset | HubStream:
    made: HubDataset | HubStream
    if streaming:
        made = HubStream(path, name, split, val_split, val_path, text_column, val_fraction, stream_readers)
    else:
        made = HubDataset(path, name, split, val_split, val_path, text_column)
    made.skipped = Skipped() if bad_rows == "skip" else None
    made.limits = Limits(max_text_bytes=max_text_bytes, encoding_errors=encoding_errors, skipped=made.skipped)
    return made


class HubDataset:
    """One document per row.

    Raises:
        ConfigError: the set, its split or its column does not exist, or validation rows are also training rows.
    """

    def __init__(
        self, path: str | None, name: str | None, split: str, val_split: str | None, val_path: str | None,
        text_column: str,
    ) -> None:
        if not path:
            raise ConfigError(_NO_PATH)
        self.path, self.name, self.split, self.text_column = path, name, split, text_column
        self.rows: dict[Split, Any] = {"train": _load(path, name, "data.path", split, text_column)}
        self._origins = Origins()
        self._origins.add_set(path, name, split, self.rows["train"], "data.path")
        own = "validation" in (self.rows["train"].info.splits or {}) and not names_of(split) & {"validation", "all"}
        if val_path or val_split or own:
            key = "data.val_path" if val_path else "data.val_split"
            held = val_path or path, name, val_split or (split if val_path else "validation")
            self.rows["validation"] = _load(held[0], name, key, held[2], text_column)
            self._origins.add_set(*held, self.rows["validation"], key)
        self.has_validation = "validation" in self.rows

    limits = Limits()
    skipped: Skipped | None = None

    def documents(self, split: Split) -> Iterator[str]:
        n, where = 1, f"{self.path} ({split})"
        for batch in self.rows[split].select_columns([self.text_column]).with_format("arrow").iter(batch_size=1000):
            found = texts_of(batch.column(0), n, where, self.text_column, "data.path", self.limits)
            yield from (text for _, text in found if text)
            n += len(batch)

    def identity(self) -> str:
        return f"{self.limits.identity}hf {self.text_column} {' '.join(self._origins.known)}"

    def describe(self) -> str:
        name = f" {self.name}" if self.name else ""
        return f"{self.path}{name} ({len(self.rows['train']):,} rows of {self.split}, column {self.text_column})"


def _load(path: str, name: str | None, key: str, split: str, text_column: str, streaming: bool = False) -> Any:
    remedy = "A local .jsonl, .csv or .parquet, or a folder of them, needs no hub."
    with set_errors(key, path, split, "what load_dataset takes", remedy):
        rows = load_dataset(path, name, split, streaming)
        columns = rows.column_names or list(next(iter(rows), {}))  # a stream may not know them before its first row
    if text_column not in columns:
        raise ConfigError(
            f"`data.text_column` must be one of {', '.join(columns)} for {path}, "
            f"but is {text_column} instead.{hint(text_column, columns)}"
        )
    kind = rows.features[text_column].dtype if rows.features else "string"
    if kind not in ("string", "large_string"):
        raise ConfigError(f"`data.text_column` must hold text, but {text_column} of {path} holds {kind} instead.")
    return rows


class HubStream:
    """A set read row by row, never as a whole. Rows are numbered as in the set, blank ones included; within each file,
    where the readers of `txtrain.data.store.stream` have files of their own.

    Attributes:
        n_files: that can be read alone.
        by_files: each reader has files of its own; else each has its share of the rows.

    Raises:
        ConfigError: as `HubDataset`; or a split with slices, which a stream cannot have.
    """

    has_validation = True
    limits = Limits()
    skipped: Skipped | None = None

    def __init__(
        self, path: str | None, name: str | None, split: str, val_split: str | None, val_path: str | None,
        text_column: str, val_fraction: float, readers: int = 1,
    ) -> None:
        if not path:
            raise ConfigError(_NO_PATH)
        for key, value in (("split", split), ("val_split", val_split)):
            if value is not None and not re.fullmatch(r"\w+", value):
                raise ConfigError(
                    f"`data.{key}` must be the name of a split with data.streaming=true, but is {value} instead."
                )
        self.path, self.name, self.split = path, name, split
        self.text_column, self.val_fraction = text_column, val_fraction
        self.rows = _load(path, name, "data.path", split, text_column, streaming=True)
        origins = Origins()
        origins.add_set(path, name, split, self.rows, "data.path", streamed=True)
        self.held_out = None
        if val_path or val_split:
            key, held = "data.val_path" if val_path else "data.val_split", (val_path or path, name, val_split or split)
            self.held_out = _load(held[0], name, key, held[2], text_column, streaming=True)
            origins.add_set(*held, self.held_out, key, streamed=True)
        self.readers, self.n_files = readers, self.rows.num_shards
        self.by_files = 1 < readers <= self.n_files
        self._known = [p for p in (path, val_path) if p and os.path.exists(p)]
        self._words = f"{path} {name} {split} {val_path} {val_split} {text_column}"

    def stream(self, file: int, part: int = 0) -> Iterator[tuple[int, Any]]:
        """The rows of a file from a part on, some at a time: the number of their part, and their texts as an Arrow
        column of bytes. The parts of a .parquet file are its row groups (datasets 5); other files have one.
        """
        return self._read(self.rows, file, part)

    def text(self, raw: bytes | None, number: int, file: int) -> str | None:
        """The text of a training row; None: it is blank, held out, or skipped."""
        text = self._text(raw, number, file)
        held_out = text is None or (self.held_out is None and is_held_out(number, self.val_fraction))
        return None if held_out else text

    def validation(self) -> Iterator[str]:
        """The texts of the validation split, else of the held-out rows."""
        own, numbers = self.held_out is not None, itertools.count()
        rows: Any = self.held_out if own else self.rows
        for file in range(rows.num_shards):
            numbers = itertools.count() if self.by_files else numbers
            for _, column in self._read(rows, file):
                for raw, number in zip(column.to_pylist(), numbers, strict=False):
                    text = self._text(raw, number, file)
                    if text is not None and (own or is_held_out(number, self.val_fraction)):
                        yield text

    def _text(self, raw: bytes | None, number: int, file: int) -> str | None:
        where = f"row {number + 1} of {self.path}" + (f", file {file + 1}" if self.by_files else "")
        text = decoded(raw, where, self.text_column, "data.path", self.limits)
        return text if text and not text.isspace() else None

    def _read(self, rows: Any, file: int, part: int = 0) -> Iterator[tuple[int, Any]]:
        import pyarrow as pa

        with set_errors("data.path", str(self.path), self.split, "a set that can be read to its end"):
            whole = rows.shard(rows.num_shards, file)
            parts = whole.reshard() if hasattr(whole, "reshard") else whole
            for at in range(part, parts.num_shards):
                one = parts.shard(parts.num_shards, at).with_format("arrow")
                for batch in one.iter(batch_size=_TOGETHER):
                    column = batch.column(self.text_column).cast(pa.large_binary())
                    yield at, pa.concat_arrays(column.chunks)

    def identity(self) -> str:
        files: list[Path] = []
        for known in map(Path, self._known):
            files += [known] if known.is_file() else sorted(file for file in known.rglob("*") if file.is_file())
        fraction = None if self.held_out is not None else self.val_fraction
        by_files = " by files" if self.by_files else ""
        return f"{self.limits.identity}hf stream {self._words} {fraction}{by_files} {files_identity(files)}"

    def describe(self) -> str:
        each = f"own files of {self.n_files}" if self.by_files else f"one row in {self.readers}"
        readers = f"; {self.readers} readers with {each} each" if self.readers > 1 else ""
        name = f" {self.name}" if self.name else ""
        return f"{self.path}{name}, streamed ({self.split}, column {self.text_column}{readers})"

"""The documents of a file: a text is one, and each row of .jsonl and .parquet is one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from txtrain.data.sources.files import as_text, open_unpacked, read_text, unpacked_name
from txtrain.errors import ConfigError, hint

KINDS = (".txt", ".jsonl", ".parquet")  # that are read from a folder
_ROWS = (".jsonl", ".parquet")
_BATCH = 1000  # rows of .parquet that are in memory at once


def has_rows(path: Path) -> bool:
    """Whether a document is a row of the file and not the file."""
    return unpacked_name(path).endswith(_ROWS)


def documents_of(path: Path, key: str, text_column: str) -> Iterator[str]:
    """The texts of a file, read as they are asked for; rows whose text is null are left out.

    Args:
        key: of the configuration, that names the file.

    Raises:
        ConfigError: the file is not what its name says, or a row has no text in text_column.
    """
    name = unpacked_name(path)
    if name.endswith(".jsonl"):
        yield from _jsonl(path, key, text_column)
    elif name.endswith(".parquet"):
        yield from _parquet(path, key, text_column)
    else:
        yield read_text(path, key)


def _jsonl(path: Path, key: str, column: str) -> Iterator[str]:
    with open_unpacked(path, key) as f:
        at = 0
        for number, raw in enumerate(f, start=1):
            line = as_text(raw, path, key, at)
            at += len(raw)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise ConfigError(f"`{key}` must have one JSON object a line, but line {number} of {path} is none: {e.msg} at column {e.colno}.") from None
            if not isinstance(row, dict):
                raise ConfigError(f"`{key}` must have one JSON object a line, but line {number} of {path} is a {type(row).__name__}.")
            if column not in row:
                raise ConfigError(_no_column(list(row), column, f"line {number} of {path}"))
            if row[column] is not None and not isinstance(row[column], str):
                raise ConfigError(f"`data.text_column` must hold text, but {column} in line {number} of {path} is {row[column]!r:.60}.")
            if row[column] is not None:
                yield row[column]


def _parquet(path: Path, key: str, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if column not in names:
            raise ConfigError(_no_column(names, column, str(path)))
        kind = file.schema_arrow.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ConfigError(f"`data.text_column` must hold text, but {column} of {path} holds {kind} instead.")
        for batch in file.iter_batches(_BATCH, columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pa.ArrowException, OSError) as e:
        raise ConfigError(f"`{key}` must be a whole Parquet file, but {path} is not: {str(e).splitlines()[0]}") from e


def _no_column(names: list[str], column: str, where: str) -> str:
    return f"`data.text_column` must be one of {', '.join(names) or '(there is none)'} for {where}, but is {column} instead.{hint(column, names)}"

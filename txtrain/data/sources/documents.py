"""The documents of a file: a text is one, and each row of .jsonl and .parquet is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from txtrain.data.sources.files import Limits, as_text, open_unpacked, read_text, unpacked_name
from txtrain.errors import ConfigError, hint
from txtrain.ground.plain_files import check_expansion, parse_json, shorten

KINDS = (".txt", ".jsonl", ".parquet")  # that are read from a folder
_ROWS = (".jsonl", ".parquet")
_BATCH = 1000  # rows of .parquet that are in memory at once


def has_rows(path: Path) -> bool:
    """Whether a document is a row of the file and not the file."""
    return unpacked_name(path).endswith(_ROWS)


def documents_of(path: Path, key: str, text_column: str, limits: Limits) -> Iterator[str]:
    """The texts of a file, read as they are asked for; rows whose text is null are left out.

    Args:
        key: of the configuration, that names the file.

    Raises:
        ConfigError: the file is not what its name says, a row has no text in text_column, or it is beyond the limits.
    """
    name = unpacked_name(path)
    if name.endswith(".jsonl"):
        yield from _jsonl(path, key, text_column, limits)
    elif name.endswith(".parquet"):
        yield from _parquet(path, key, text_column, limits)
    else:
        yield read_text(path, key, limits)


def rows_of(path: Path, key: str, limits: Limits) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with its place: lines of .jsonl, the list that a .json is (or its lines), rows of .parquet.

    Raises:
        ConfigError: the file is not what its name says, or it is beyond the limits.
    """
    name = unpacked_name(path)
    if name.endswith(".parquet"):
        yield from ((f"row {i} of {path}", row) for i, row in enumerate(_parquet(path, key, None, limits)))
        return
    if name.endswith(".json"):
        with open_unpacked(path, key, limits) as f:
            listed = f.read(1 << 10).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        if listed:
            rows = parse_json(f'{{"rows":{read_text(path, key, limits)}}}', f"`{key}`: {path}", finite=False)["rows"]
            for i, row in enumerate(rows):
                if not isinstance(row, dict):
                    raise ConfigError(f"`{key}` must hold a list of objects, but item {i} of {path} is {shorten(repr(row))}.")
                yield f"item {i} of {path}", row
            return
    yield from _json_lines(path, key, limits)


def _json_lines(path: Path, key: str, limits: Limits) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_unpacked(path, key, limits) as f:
        at = 0
        for number, raw in enumerate(iter(lambda: f.readline(limits.max_text_bytes + 1), b""), start=1):
            where = f"line {number} of {path}"
            limits.check_text(len(raw), where, key)
            line = as_text(raw, path, key, at)
            at += len(raw)
            if line.strip():
                yield where, parse_json(line.strip(), f"`{key}`: {where}", finite=False)  # pandas writes NaN into other columns


def _jsonl(path: Path, key: str, column: str, limits: Limits) -> Iterator[str]:
    for where, row in _json_lines(path, key, limits):
        if column not in row:
            raise ConfigError(_no_column(list(row), column, where))
        if row[column] is not None and not isinstance(row[column], str):
            raise ConfigError(f"`data.text_column` must hold text, but {column} in {where} is {shorten(repr(row[column]))}.")
        if row[column] is not None:
            yield row[column]


def _parquet(path: Path, key: str, column: str | None, limits: Limits) -> Iterator[Any]:
    """The texts of a column, or whole rows as mappings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if column is not None:
            if column not in names:
                raise ConfigError(_no_column(names, column, str(path)))
            kind = file.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ConfigError(f"`data.text_column` must hold text, but {column} of {path} holds {kind} instead.")
        where, size = f"`{key}`: {path}", path.stat().st_size
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        said = sum(c.total_uncompressed_size for c in chunks if column in (None, c.path_in_schema))
        check_expansion(said, size, limits.max_expansion, where)
        unpacked = 0  # a text that stands in the file once may be that of each row: few at a time of a small file
        for batch in file.iter_batches(max(1, min(_BATCH, size >> 16)), columns=None if column is None else [column]):
            unpacked += batch.nbytes
            check_expansion(unpacked, size, limits.max_expansion, where)
            if column is None:
                yield from batch.to_pylist()
                continue
            for text in batch.column(0).to_pylist():
                if text is not None:
                    limits.check_text(len(text), f"a row of {path}", key)
                    yield text
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as e:
        raise ConfigError(f"`{key}` must be a whole Parquet file, but {path} is not: {shorten(e)}") from e


def _no_column(names: list[str], column: str, where: str) -> str:
    return f"`data.text_column` must be one of {shorten(', '.join(names)) or '(there is none)'} for {where}, but is {column} instead.{hint(column, names)}"

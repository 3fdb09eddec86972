"""The documents of a file: the whole text, or each row of .jsonl and .parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from txtrain.data.sources.files import (
    Limits,
    Text,
    as_text,
    open_unpacked,
    text_chunks,
    text_of,
    undecoded,
    unpacked_name,
)
from txtrain.errors import ConfigError, hint, shorten
from txtrain.ground.plain_files import check_expansion, parse_json

Row = TypeVar("Row")

KINDS = (".txt", ".jsonl", ".parquet")  # that are read from a folder
_ROWS = (".jsonl", ".parquet")
_BATCH = 1000  # rows of .parquet in memory at once
_JSON = "arrow.json"  # Arrow's type of texts that `datasets` gives as what they hold
_LIST = 1_000_000_000  # characters of a list in .json; as objects of Python up to 24 times as many bytes


def has_rows(path: Path) -> bool:
    """Whether each row of the file is a document."""
    return unpacked_name(path).endswith(_ROWS)


def documents_of(path: Path, key: str, text_column: str, limits: Limits) -> Iterator[Text]:
    """The texts of a file, read lazily; rows whose text is null are left out.

    Args:
        key: the config key that names the file.

    Raises:
        ConfigError: the file is not of its suffix's format, exceeds the limits, or a row has no text in text_column.
    """
    name = unpacked_name(path)
    if name.endswith(".jsonl"):
        yield from rows_of(path, key, limits, partial(_of_json, key, text_column, limits))
    elif name.endswith(".parquet"):
        yield from _parquet(path, key, text_column, limits)
    else:
        yield text_of(path, key, limits)


def rows_of(path: Path, key: str, limits: Limits, parse: Callable[[str, str], Row | None]) -> Iterator[Row]:
    """`parse(line, place)` of each line that is not blank; None is left out.

    Raises:
        ConfigError: as `parse`, or a line is not UTF-8 or exceeds the limits.
    """
    with open_unpacked(path, key, limits) as f:
        at = 0
        for number, raw in enumerate(iter(lambda: f.readline(limits.max_text_bytes + 1), b""), start=1):
            where, made = f"line {number} of {path}", None
            with limits.row(where):
                limits.check_text(len(raw), where, key)
                line = as_text(raw, where, key, at, limits.encoding_errors)
                made = parse(line, where) if line.strip() else None
            at += len(raw)
            while len(raw) > limits.max_text_bytes and not raw.endswith(b"\n"):  # the rest of a skipped line
                raw = f.readline(limits.max_text_bytes + 1)
                at += len(raw)
            if made is not None:
                yield made


def _of_json(key: str, column: str, limits: Limits, line: str, where: str) -> str | None:
    replace = limits.encoding_errors == "replace"
    # finite=False: pandas writes NaN into other columns.
    row = parse_json(line.strip(), f"`{key}`: {where}", finite=False, whole=not replace)
    if column not in row:
        raise ConfigError(_no_column(list(row), column, where))
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"`data.text_column` must hold text, but {column} in {where} is {shorten(repr(text))}.")
    return without_halves(text) if text and replace else text


def without_halves(value: Any) -> Any:
    """A JSON value with U+FFFD for each half of a character in its texts."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [without_halves(one) for one in value]
    if isinstance(value, dict):
        return {without_halves(key): without_halves(one) for key, one in value.items()}
    return value


def texts_of(
    column: Any, first: int, path: object, name: str, key: str, limits: Limits
) -> Iterator[tuple[int, str]]:
    """Number and text of each row of an Arrow column, without nulls. Arrow does not check UTF-8. first: number of its
    first row.

    Raises:
        ConfigError: a text is not UTF-8, or too long.
    """
    import pyarrow as pa

    kind = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
    for number, raw in enumerate(column.cast(kind).to_pylist(), start=first):
        text = decoded(raw, f"row {number} of {path}", name, key, limits)
        if text is not None:
            yield number, text


def decoded(raw: bytes | None, where: str, name: str, key: str, limits: Limits) -> str | None:
    """The text of a row; None: it has none, or is skipped. Raises ConfigError: as `texts_of`."""
    text = None
    with limits.row(where):
        limits.check_text(len(raw or b""), where, key)
        text = None if raw is None else _decode(raw, where, name, key, limits)
    return text


def _decode(raw: bytes, where: str, name: str, key: str, limits: Limits) -> str:
    with undecoded(f"{name} in {where}", key, 0):
        return raw.decode("utf-8", limits.encoding_errors)


def rows_in(batches: Iterable[Any], path: object, key: str, limits: Limits) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) for the rows of Arrow batches, numbered from 1.

    Raises:
        ConfigError: a text is not UTF-8, or a row is too long.
    """
    n = 0
    for batch in batches:
        places = [f"row {n + i} of {path}" for i in range(1, len(batch) + 1)]
        known = batch.nbytes <= limits.max_text_bytes and not any(_JSON in str(kind) for kind in batch.schema.types)
        try:
            plain = batch.to_pylist() if known else None
        except UnicodeDecodeError:
            plain = None
        yield from zip(places, plain, strict=True) if plain is not None else _checked(batch, places, key, limits)
        n += len(batch)


def _checked(batch: Any, places: list[str], key: str, limits: Limits) -> Iterator[tuple[str, dict[str, Any]]]:
    """`rows_in` of a batch, value by value."""
    import pyarrow as pa

    columns = {
        name: column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }
    for i, where in enumerate(places):
        row = None
        with limits.row(where):
            limits.check_text(sum(column.slice(i, 1).nbytes for column in columns.values()), where, key)
            row = {name: _value(column[i], name, where, key, limits) for name, column in columns.items()}
        if row is not None:
            yield where, row


def _value(value: Any, name: str, where: str, key: str, limits: Limits) -> Any:
    """An Arrow value as Python's, with its texts decoded by us."""
    import pyarrow as pa

    within = partial(_value, where=where, key=key, limits=limits)
    if not value.is_valid:
        return None
    if isinstance(value, pa.StringScalar | pa.LargeStringScalar):
        return _decode(value.as_buffer().to_pybytes(), where, name, key, limits)
    if getattr(value.type, "extension_name", None) == _JSON:
        held = f'{{"value":{within(value.value, name)}}}'
        return _object_of(key, limits, held, f"{name} in {where}")[1]["value"]
    if isinstance(value, pa.StructScalar):
        return {part: within(one, f"{name}.{part}") for part, one in value.items()}
    if isinstance(value, pa.MapScalar):
        return [tuple(within(one, name) for one in pair.values()) for pair in value.values]
    if isinstance(value, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        return [within(one, name) for one in value.values]
    return within(value.value, name) if isinstance(value, pa.DictionaryScalar) else value.as_py()


def rows_of_set(rows: Any, path: str, key: str, limits: Limits) -> Iterator[tuple[str, dict[str, Any]]]:
    """`rows_in` of what `load_dataset` gives."""
    tables = rows.with_format("arrow").iter(batch_size=_BATCH)
    return rows_in((batch for table in tables for batch in table.to_batches()), path, key, limits)


def objects_of(path: Path, key: str, limits: Limits) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) for the lines of .jsonl, the list of a .json (or its lines), the rows of .parquet.

    Raises:
        ConfigError: the file is not of its suffix's format, or exceeds the limits.
    """
    name = unpacked_name(path)
    if name.endswith(".parquet"):
        yield from _parquet(path, key, None, limits)
        return
    if name.endswith(".json"):
        with open_unpacked(path, key, limits) as f:
            is_list = f.read(1 << 10).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        if is_list:
            whole = "".join(_of_list(path, key, limits))
            rows = _object_of(key, limits, f'{{"rows":{whole}}}', str(path))[1]["rows"]
            for i, row in enumerate(rows, start=1):
                if not isinstance(row, dict):
                    said = shorten(repr(row))
                    raise ConfigError(f"`{key}` must be a list of objects, but item {i} of {path} is {said}.")
                yield f"item {i} of {path}", row
            return
    yield from rows_of(path, key, limits, partial(_object_of, key, limits))


def _of_list(path: Path, key: str, limits: Limits) -> Iterator[str]:
    """The chunks of a .json, whose rows are all in memory at once."""
    n = 0
    for chunk in text_chunks(path, key, limits):
        n += len(chunk)
        if n > _LIST:
            allowed = f"of .jsonl, a row a line, beyond {_LIST:,} characters"
            raise ConfigError(f"`{key}` must be {allowed}, but {path} is a list in .json, which is read whole.")
        yield chunk


def _object_of(key: str, limits: Limits, line: str, where: str) -> tuple[str, dict[str, Any]]:
    replace = limits.encoding_errors == "replace"
    row = parse_json(line.strip(), f"`{key}`: {where}", finite=False, whole=not replace)
    return where, without_halves(row) if replace else row


def _parquet(path: Path, key: str, column: str | None, limits: Limits) -> Iterator[Any]:
    """The texts of a column, or (place, row) of whole rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if column is not None and column not in names:
            raise ConfigError(_no_column(names, column, str(path)))
        kind = pa.string() if column is None else file.schema_arrow.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ConfigError(f"`data.text_column` must hold text, but {column} of {path} holds {kind} instead.")
        where, size = f"`{key}`: {path}", path.stat().st_size
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        said = sum(c.total_uncompressed_size for c in chunks if column in (None, c.path_in_schema))
        check_expansion(said, size, limits.max_expansion, where)
        batches = _measured(file, column, size, limits, where)
        if column is None:
            yield from rows_in(batches, path, key, limits)
            return
        n = 1
        for batch in batches:
            yield from (text for _, text in texts_of(batch.column(0), n, path, column, key, limits))
            n += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as e:
        raise ConfigError(f"`{key}` must be a whole Parquet file, but {path} is not: {shorten(e)}") from e


def _measured(file: Any, column: str | None, size: int, limits: Limits, where: str) -> Iterator[Any]:
    """The batches of a file of that size. Raises ConfigError: they unpack to too much."""
    unpacked, rows = 0, max(1, min(_BATCH, size >> 16))  # one text in the file may be that of all rows
    for batch in file.iter_batches(rows, columns=None if column is None else [column]):
        unpacked += batch.nbytes
        check_expansion(unpacked, size, limits.max_expansion, where)
        yield batch


def _no_column(names: list[str], column: str, where: str) -> str:
    return (
        f"`data.text_column` must be one of {shorten(', '.join(names)) or '(there is none)'} for {where}, "
        f"but is {column} instead.{hint(column, names)}"
    )

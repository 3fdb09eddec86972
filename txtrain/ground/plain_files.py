"""Reading files that a stranger may have written, as plain data: JSON, YAML and arrays, with limits.

A file must be regular, a link must stay in its folder, and size, depth and number of digits are bounded. Names are
unique, text is valid UTF-8, and nothing is executed: no tags, no anchors, no pickles. Every problem is a ConfigError
that names the file.
"""

from __future__ import annotations

import io
import json
import math
import stat
import types
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from txtrain.errors import ConfigError, shorten

if TYPE_CHECKING:
    from numpy.typing import NDArray

LIMIT = 10_000_000  # bytes of a file; Python objects take about twenty times as many
TENSORS_LIMIT = 50_000_000  # bytes of a safetensors header or index; a model of 1e12 parameters has 15 million
TOKENIZER_LIMIT = 100_000_000  # bytes; Gemma's tokenizer.json has 34 million
YAML_LIMIT = 1_000_000  # bytes; the configuration of a run has a few thousand
_DEPTH = 64
_DIGITS = 40  # of an integer; 2**128 has 39
_EVENTS = 200_000  # of a YAML file
EXPANSION_FLOOR = 64_000_000  # bytes to which any compressed file may expand
_WORDS: dict[Any, str] = {
    int: "an integer", float: "a number", str: "text", bool: "true or false", dict: "a mapping", list: "a list",
    types.NoneType: "null", Any: "a value"
}


# --------------------------------------------------------------------------------------------------------------- files


def check_links(paths: Iterable[Path]) -> None:
    """Refuse links that leave their folder, except those of the hub's cache: `snapshots/REVISION/NAME -> blobs/HASH`.

    Raises:
        ConfigError: names the link and its target.
    """
    for path in paths:
        if not path.is_symlink():
            continue
        try:
            home, target = path.parent.resolve(), path.resolve()
        except (OSError, RuntimeError) as e:  # RuntimeError: a loop, before Python 3.13
            raise ConfigError(f"{path} must be a file, but is a link to itself.") from e
        cached = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
        if not cached and not target.is_relative_to(home):
            raise ConfigError(f"{path} must stay in its folder, but is a link to {target}.")


def read_bytes(path: Path, limit: int = LIMIT) -> bytes:
    """The bytes of a regular file; see `check_file`."""
    size = check_file(path, limit)
    try:
        with path.open("rb") as f:
            return f.read(size)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}.") from e


def check_file(path: Path, limit: int | None = LIMIT) -> int:
    """The size of a regular file in bytes.

    Raises:
        ConfigError: it is missing, larger than `limit`, a pipe, a device, a folder, or a link out of its folder.
    """
    check_links([path])
    try:
        said = path.stat()
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}.") from e
    if not stat.S_ISREG(said.st_mode):  # reading a pipe would block
        raise ConfigError(f"{path} must be a regular file, but is {'a folder' if path.is_dir() else 'none'}.")
    if limit is not None and said.st_size > limit:
        raise ConfigError(f"{path} must have at most {limit:,} bytes, but has {said.st_size:,}.")
    return said.st_size


def read_text(path: Path, limit: int = LIMIT) -> str:
    """A UTF-8 file; see `read_bytes`."""
    return decode(read_bytes(path, limit), str(path))


def decode(raw: bytes, where: str) -> str:
    """UTF-8 as text, without a byte order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{where} must be text in UTF-8, but is not: byte 0x{raw[e.start]:02x} at {e.start}.") from e


def split_lines(text: str) -> list[str]:
    """The lines of a file that was read as text. `str.splitlines` cuts at a form feed and U+2028 too."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


# ---------------------------------------------------------------------------------------------------------------- JSON


def read_json(path: Path, limit: int = LIMIT, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object in a file; see `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, limit), str(path), finite=finite)


def parse_json(text: str | bytes, where: str, *, finite: bool = True, whole: bool = True) -> dict[str, Any]:
    """A JSON object.

    Args:
        where: its name in errors.
        finite: refuse NaN and infinities, which are not JSON but which Python writes.
        whole: refuse lone surrogates.

    Raises:
        ConfigError: it is truncated, no object, nested too deep, has a name twice or an invalid number.
    """
    try:
        made = _DECODER.decode(text if isinstance(text, str) else decode(text, where))
    except ConfigError:
        raise
    except RecursionError as e:
        raise ConfigError(f"{where} must be nested at most {_DEPTH} deep, but is deeper.") from e
    except ValueError as e:
        said: object = e
        if isinstance(e, json.JSONDecodeError):
            line = f"line {e.lineno}, " if "\n" in e.doc else ""
            said = f"{e.msg} at {line}column {e.colno}"
        raise ConfigError(f"{where} must be whole, valid JSON, but is not: {shorten(said)}.") from e
    return _object(made, where, "JSON object", finite, whole)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{shorten(repr(twice))} is there twice")
    return made


def _integer(text: str) -> int | float:
    """Long ones as float: parsing takes quadratic time."""
    return int(text) if len(text) <= _DIGITS else float(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)


# ---------------------------------------------------------------------------------------------------------------- YAML


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file of plain values: no tags, anchors, dates or further documents. Keys may be numbers.

    Raises:
        ConfigError: as `check_file`; or it is damaged, no mapping, nested too deep, or not plain.
    """
    text = read_text(path, YAML_LIMIT)
    try:
        _check_events(text)  # iteratively, before any object is made
        made = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as e:
        place = "" if e.problem_mark is None else f", line {e.problem_mark.line + 1}"
        raise ConfigError(f"{path}{place}: this is not plain YAML: {shorten(e.problem)}.") from e
    except (yaml.YAMLError, ValueError, ArithmeticError) as e:  # ValueError: an invalid date or number
        raise ConfigError(f"{path} must be plain YAML, but is not: {shorten(e)}.") from e
    return _object(made, str(path), "mapping", finite=False)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Refuses repeated keys; long integers become floats."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True) if isinstance(key, yaml.ScalarNode) else None
            if name is None or name in seen or key.tag.endswith(":merge"):
                problem = "a key that is no text or number" if name is None else f"the key {key.value!r} once more"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)
        made: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return made

    def construct_yaml_int(self, node: Any) -> int | float:
        value: int | float = float(node.value) if len(node.value) > _DIGITS else super().construct_yaml_int(node)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _check_events(text: str) -> None:
    depth = documents = 0
    for n, event in enumerate(yaml.parse(text, Loader=_Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        problems = (
            (getattr(event, "anchor", None) is not None, "an anchor or alias"),
            (getattr(event, "tag", None) is not None, "a tag"),
            (depth > _DEPTH, f"nested more than {_DEPTH} deep"),
            (documents > 1, "a further document"),
            (n > _EVENTS, f"more than {_EVENTS:,} values"),
        )
        if found := [problem for there, problem in problems if there]:
            raise yaml.MarkedYAMLError(problem=found[0], problem_mark=event.start_mark)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- values


def _object(made: Any, where: str, what: str, finite: bool, whole: bool = True) -> dict[Any, Any]:
    """`made`, checked to be a mapping of plain values."""
    if not isinstance(made, dict):
        raise ConfigError(f"{where} must be a {what}, but is {_kind(made)} instead.")
    problem = next(_problems(made, finite, whole), None)
    if problem is not None:
        raise ConfigError(f"{where}: {problem}")
    return made


def _problems(made: Any, finite: bool, whole: bool) -> Iterator[str]:
    """Problems of all nested values, without recursion."""
    waiting: list[tuple[Any, str, int]] = [(made, "", 1)]
    while waiting:
        node, path, depth = waiting.pop()
        if depth > _DEPTH:
            yield f"`{shorten(path)}` must be nested at most {_DEPTH} deep, but is deeper."
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            kind = type(value)
            if kind is dict or kind is list:
                waiting.append((value, f"{path}.{key}" if path else str(key), depth + 1))
            elif kind is float:
                if finite and not -float("inf") < value < float("inf"):
                    yield f"`{shorten(f'{path}.{key}'.strip('.'))}` must be a finite number, but is {value} instead."
            elif kind is str:
                if whole and not value.isascii() and not is_whole(value):
                    yield f"`{shorten(f'{path}.{key}'.strip('.'))}` must be whole text, but holds half of a character."
            elif value is not None and kind is not int and kind is not bool:
                yield f"`{shorten(f'{path}.{key}'.strip('.'))}` must be text or a number, but is {_kind(value)}."
            if whole and type(key) is str and not key.isascii() and not is_whole(key):
                yield f"{shorten(repr(key))} must be whole text, but holds half of a character."


def is_whole(text: str) -> bool:
    """Whether text has no lone surrogates, which JSON can escape."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    return _WORDS.get(type(value), f"a {type(value).__name__}")


def check_keys(found: Mapping[str, Any], where: str, keys: Mapping[str, Any]) -> None:
    """Check the types of values.

    keys: the type of each, such as `int`, `list[float]` or `dict[str, float] | None`. A float may be an integer; a
    missing key counts as null.

    Raises:
        ConfigError: names every key with a value of another type.
    """
    if problems := [
        f"{where}: `{key}` must be {_words(kind)}, but is {shorten(repr(found.get(key)))} instead."
        for key, kind in keys.items()
        if not _is_a(found.get(key), kind)
    ]:
        raise ConfigError(*problems)


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, one) for one in kind.__args__)
    if isinstance(kind, types.GenericAlias):
        inner = value.values() if isinstance(value, dict) else value
        return type(value) is kind.__origin__ and all(_is_a(one, kind.__args__[-1]) for one in inner)
    return type(value) is kind or kind is Any or (kind is float and type(value) is int)


def _words(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_words, kind.__args__))
    if isinstance(kind, types.GenericAlias):
        return f"{_WORDS[kind.__origin__]} of which each is {_words(kind.__args__[-1])}"
    return _WORDS[kind]


# -------------------------------------------------------------------------------------------------------------- arrays


@contextmanager
def _arrays(where: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as e:  # numpy and zipfile raise many types for damaged files
        raise ConfigError(
            f"{where} must be a whole file of numbers without Python objects, but is not: "
            f"{shorten(e) or type(e).__name__}."
        ) from e


def map_npy(path: Path, where: str | None = None) -> NDArray[Any]:
    """The numbers in a .npy file as a memory map: nothing is allocated because of its header.

    Raises:
        ConfigError: it holds anything else, such as Python objects, or is shorter than its header says.
    """
    import numpy as np

    with _arrays(where or str(path)):
        with path.open("rb") as f:
            _check_npy(f.read(_NPY_HEADER), path.stat().st_size)
        found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return found


def npz_names(path: Path, where: str) -> list[str]:
    """The names of the arrays in an .npz file."""
    with _arrays(where), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_npz(path: Path, name: str, where: str, max_expansion: float) -> NDArray[Any]:
    """One array of numbers of an .npz file; the size is checked before it is unpacked.

    Raises:
        ConfigError: it holds anything else, has another size than it says, or unpacks to more than `max_expansion`
            times its file.
    """
    import numpy as np

    with _arrays(f"{where}: {name}"), zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{name}.npy")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("numpy packs in no such way")
        check_expansion(entry.file_size, path.stat().st_size, max_expansion, f"{where}: {name}")
        with archive.open(entry) as f:
            _check_npy(f.read(_NPY_HEADER), entry.file_size)
        with archive.open(entry) as f:
            found: NDArray[Any] = np.lib.format.read_array(f, allow_pickle=False)
            return found


_NPY_HEADER = 10_016  # bytes; numpy reads at most 10,000 of a header


def _check_npy(head: bytes, size: int) -> None:
    """Check the header of an array file of `size` bytes. Raises ValueError, or what numpy raises."""
    import numpy as np

    stream = io.BytesIO(head)
    major, _ = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if dtype.kind not in "biuf":
        raise ValueError(f"it holds {'objects of Python' if dtype.hasobject else dtype}")
    needed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or needed > size - stream.tell():
        raise ValueError(f"it is to hold {needed:,} bytes of {dtype}, but has {size - stream.tell():,}")


def check_expansion(unpacked: int, packed: int, max_expansion: float, where: str) -> None:
    """Refuse a file that unpacks to far more bytes than its own.

    Raises:
        ConfigError: names the key of the limit.
    """
    if unpacked > max(EXPANSION_FLOOR, packed * max_expansion):
        raise ConfigError(
            f"{where} must unpack to at most {max_expansion:g} times its {packed:,} bytes (data.max_expansion), "
            f"but has {unpacked:,} or more inside."
        )

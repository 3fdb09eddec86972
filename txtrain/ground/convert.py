"""Plain dict <-> frozen dataclass: strict, with all problems collected. The only place where types are checked."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Protocol, TypeVar, runtime_checkable

from txtrain.errors import ConfigError, hint, shorten
from txtrain.ground.unknown_keys import unknown_key
from txtrain.registry import NONE, TABLE, group_of, out_of_range
from txtrain.registry import key_of as key_of

T = TypeVar("T")

_KINDS: dict[Any, str] = {
    int: "an integer", float: "a number", str: "a string", bool: "true or false", dict: "a mapping"
}
_MISSING = "???"  # OmegaConf's marker of a mandatory value
_MOST_PROBLEMS, _LONGEST = 50, 2000  # problems reported at once, and characters of each
_BAD = object()  # marks a value that has a problem


@runtime_checkable
class Checked(Protocol):
    """A config that checks itself, apart from the bounds of its numbers."""

    def check(self) -> Iterable[str]: ...


def build(cls: type[T], raw: Mapping[str, Any], path: str = "", file: object = None) -> T:
    """The typed, checked object that `raw` describes.

    path: its place in a run's configuration. file: where that stands, if it is a stranger's, for an error.

    Raises:
        ConfigError: all unknown or missing keys, wrong types and unknown options; if there are none, all numbers out
            of bounds; if none, the problems of the object's own `check`.
    """
    made, problems = part(cls, raw, path)
    if problems or (isinstance(made, Checked) and (problems := list(made.check()))):
        raise ConfigError(*(problem if file is None else f"{file}: {problem}" for problem in problems))
    return typing.cast(T, made)


def checked(value: Any, cls: type[T], name: str, path: str = "") -> T:
    """The argument `name` of a public function, checked: it may have been built or changed by hand.

    path: its place in a run's configuration.

    Raises:
        ConfigError: it is no `cls`, or `build` would refuse it.
    """
    if not isinstance(value, cls):
        kind = type(value).__name__
        raise ConfigError(f"`{name}` must be a {cls.__name__}, as txtrain.compose makes it, but is {kind} instead.")
    made, problems = part(type(value), plain(value), path)
    problems = problems or list(_differences(made, value, path))
    if problems or (isinstance(value, Checked) and (problems := list(value.check()))):
        raise ConfigError(*problems)
    return value


def _differences(made: Any, value: Any, path: str) -> Iterator[str]:
    """Values of another type than `build` makes, such as a dict in place of a dataclass."""
    if type(made) is not type(value) and not (type(value) is int and type(made) is float):
        yield f"`{path}` must be {type(made).__name__}, but is {type(value).__name__} instead."
    elif dc.is_dataclass(made):
        for f in dc.fields(made):
            yield from _differences(getattr(made, f.name), getattr(value, f.name), _join(path, key_of(f)))
    elif isinstance(made, Mapping):
        for key in made:
            yield from _differences(made[key], value[key], _join(path, str(key)))
    elif isinstance(made, (list, tuple)):
        for i, (ours, theirs) in enumerate(zip(made, value, strict=True)):
            yield from _differences(ours, theirs, f"{path}[{i}]")


def part(cls: type[T], raw: Mapping[str, Any], path: str) -> tuple[T | None, list[str]]:
    """As `build`, for the part of a configuration at `path`, without its `check`: the object, or None and problems."""
    reader = _Reader(cls)
    made = reader.dataclass(cls, raw, path, None)
    problems = reader.problems or list(out_of_range(made, path))
    return (None, problems) if problems else (typing.cast(T, made), [])


def plain(obj: Any) -> Any:
    """As dicts, lists and values, from which `build` makes the same object, also after YAML or JSON."""
    if dc.is_dataclass(obj) and not isinstance(obj, type):
        return {key_of(f): plain(getattr(obj, f.name)) for f in dc.fields(obj)}
    if isinstance(obj, (list, tuple)):
        return [plain(v) for v in obj]
    if isinstance(obj, Mapping):
        return {k: plain(v) for k, v in obj.items()}
    return obj


def key_paths(cls: type) -> dict[str, dict[str, Any]]:
    """Every dotted key that some combination of options has, in order, with the metadata of its fields."""
    return _key_paths(cls, "", sum(map(len, TABLE.values())))


@cache  # n_options: components may be registered later
def _key_paths(cls: type, prefix: str, n_options: int) -> dict[str, dict[str, Any]]:
    paths: dict[str, dict[str, Any]] = {}
    for f in dc.fields(cls):
        path = _join(prefix, key_of(f))
        paths[path] = dict(f.metadata)
        for part in parts(cls, f):
            for key, marks in _key_paths(part, path, n_options).items():
                paths[key] = paths.get(key, {}) | marks
    return paths


def is_marked(cls: type, key: str, mark: str) -> bool:
    """Whether `marked` has the dotted key; looks at the fields on the way to it alone."""
    first, _, rest = key.partition(".")
    return any(
        any(is_marked(part, rest, mark) for part in parts(cls, f)) if rest else bool(f.metadata.get(mark))
        for f in dc.fields(cls)
        if key_of(f) == first
    )


def marked(cls: type, mark: str) -> dict[str, Any]:
    """Dotted key -> value of the mark (`registry.knob`), for the fields that have it."""
    return {key: marks[mark] for key, marks in key_paths(cls).items() if marks.get(mark)}


def without_foreign(cls: type, raw: dict[str, Any], given: Iterable[str]) -> list[str]:
    """Remove from an earlier run's configuration, in place, what only the user may give (`knob(from_run=...)`).

    Returns:
        A sentence on each value that was removed, but for those of the keys in `given`.
    """
    file = "is not taken from the run's config.yaml, which says"
    removed = dict(_removed(cls, raw, ""))
    return [
        f"{key} {file} {shorten(repr(said))}: give it again to use it."
        for key, said in removed.items() if key not in given
    ]


def _removed(cls: type, raw: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Walks the file's own mappings: a name that the user chose may hold dots."""
    for f in dc.fields(cls):
        key, value = key_of(f), raw.get(key_of(f))
        if (may := f.metadata.get("from_run")) and value is not None and not may(value):
            raw[key] = None
            yield _join(prefix, key), value
        if not isinstance(value, dict):
            continue
        several = "axes" in f.metadata
        each = dc.field(metadata={"axis": f.metadata["axes"]}) if several else f
        for name, inner in value.items() if several else [("", value)]:
            for part in parts(cls, each) if isinstance(inner, dict) else ():
                yield from _removed(part, inner, ".".join(filter(None, (prefix, key, str(name)))))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def differing(old: Mapping[str, Any], new: Mapping[str, Any], free: Iterable[str]) -> list[tuple[str, Any, Any]]:
    """Dotted key, old and new value of each difference of two plain configs, except for `free` keys and those below.
    A key that one of them lacks, as another version wrote it, counts as null or an empty list."""
    a, b = flat(old), flat(new)
    pairs = [(key, a.get(key), b.get(key)) for key in {**a, **b} if not among(key, free)]
    return [(key, x, y) for key, x, y in pairs if x != y and [x, y] not in ([None, []], [[], None])]


def among(key: str, keys: Iterable[str]) -> bool:
    """Whether a dotted key is one of `keys`, or below one."""
    return any(f"{key}.".startswith(f"{k}.") for k in keys)


def parts(cls: type, f: dc.Field[Any]) -> Iterator[type]:
    """The dataclasses that the field may hold."""
    if "axis" in f.metadata:
        yield from dict.fromkeys(option.config for option in TABLE.get(f.metadata["axis"], {}).values())
    elif dc.is_dataclass(hint_of := hints(cls)[f.name]):
        yield typing.cast(type, hint_of)


@cache
def hints(cls: type) -> dict[str, Any]:
    """Field types of a dataclass, resolved."""
    try:
        return typing.get_type_hints(cls)
    except NameError as e:  # a user's own Config that imports a type only for type checkers
        raise ConfigError(
            f"`{cls.__module__}.{cls.__qualname__}`: the types of its fields cannot be resolved: {e}."
        ) from e


class _Reader:
    """One pass over a raw config that collects all problems."""

    def __init__(self, root: type) -> None:
        self.root = root
        self.problems: list[str] = []

    def dataclass(self, cls: type, raw: Any, path: str, axis: str | None, absent: Mapping[str, str] = NONE) -> Any:
        """axis: of which `cls` is an option, or None. absent: as of a registered option."""
        if not isinstance(raw, Mapping):
            return self.problem(f"`{path}` must be a mapping, but is {raw!r} instead.")
        fields = {key_of(f): f for f in dc.fields(cls) if f.init}
        older = {f.metadata["was"]: name for name, f in fields.items() if "was" in f.metadata and name not in raw}
        raw = {older.get(key, key): value for key, value in raw.items()} if older else raw
        for key in raw:
            if key not in fields and len(self.problems) < _MOST_PROBLEMS:  # a limit, since finding near names is slow
                said = unknown_key(_join(path, shorten(key)), raw[key], fields, key_paths(self.root), axis)
                self.problem(said + absent.get(key, ""))
        values = {}
        for name, f in fields.items():
            if name in raw:
                values[f.name] = self.field(cls, f, raw[name], _join(path, name))
            elif f.default is dc.MISSING and f.default_factory is dc.MISSING:
                self.problem(f"`{_join(path, name)}` must be given.")
        return _BAD if self.problems else cls(**values)

    def field(self, cls: type, f: dc.Field[Any], value: Any, path: str) -> Any:
        if "axis" in f.metadata:
            return self.option(f, value, path)
        if "axes" in f.metadata and isinstance(value, Mapping):
            each = dc.field(metadata={"axis": f.metadata["axes"]})
            return {str(name): self.option(each, one, f"{path}.{name}") for name, one in value.items()}
        if "choice" in f.metadata and isinstance(value, str) and value != _MISSING:
            return (
                value if value in (options := TABLE[f.metadata["choice"]]) else self.not_an_option(path, value, options)
            )
        value = str(value) if "unit" in f.metadata and type(value) in (int, float) else value
        return self.value(hints(cls)[f.name], value, path)

    def option(self, f: dc.Field[Any], raw: Any, path: str) -> Any:
        """The config of an option, from a mapping whose tag (`type`, or the field's own) names the option."""
        axis, tag = f.metadata["axis"], f.metadata.get("tag", "type")
        options = TABLE.get(axis, {})
        if raw is None and f.metadata.get("optional"):
            return None
        if not isinstance(raw, Mapping):
            how = (
                f"write {group_of(axis)}={raw}"
                if tag == "type" and path == axis else f"write {path}={{{tag}: {next(iter(options))}, ...}}"
            )
            return self.problem(
                f"`{path}` must be a mapping{' or null' if f.metadata.get('optional') else ''}, but is {raw!r} "
                f"instead: {how}."
            )
        kind = raw.get(tag)
        if not isinstance(kind, str) or kind not in options:
            return self.not_an_option(f"{path}.{tag}", kind, options)
        return self.dataclass(options[kind].config, raw, path, axis, options[kind].absent)

    def value(self, tp: Any, v: Any, path: str) -> Any:
        if v == _MISSING:
            return self.problem(f"`{path}` must be given.")
        if tp is Any:
            return v
        if dc.is_dataclass(tp):
            return self.dataclass(typing.cast(type, tp), v, path, None)
        origin, args = typing.get_origin(tp), typing.get_args(tp)
        if origin in (typing.Union, types.UnionType):
            got = self.first_of(args, v, path)
        elif origin in (tuple, list) and isinstance(v, (list, tuple)) and (_endless(tp) or len(v) == len(args)):
            return origin(self.value(args[0] if _endless(tp) else args[i], x, f"{path}[{i}]") for i, x in enumerate(v))
        elif origin is dict and isinstance(v, Mapping):
            return {k: self.value(args[1], x, _join(path, str(k))) for k, x in v.items()}
        else:
            got = _scalar(tp, v)
        if got is _BAD:
            self.problem(f"`{path}` must be {describe(tp)}, but is {v!r} instead.{hint(v, _words(tp))}")
        return got

    def first_of(self, members: tuple[Any, ...], v: Any, path: str) -> Any:
        for member in members:
            trial = _Reader(self.root)
            got = trial.value(member, v, path)
            if not trial.problems:
                return got
        return _BAD

    def problem(self, text: str) -> Any:
        self.problems.append(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")
        return _BAD

    def not_an_option(self, path: str, value: Any, options: Mapping[str, Any]) -> Any:
        got = "missing" if value is None else f"{value!r} instead"
        return self.problem(f"`{path}` must be one of {', '.join(options)}, but is {got}.{hint(value, options)}")


def _scalar(tp: Any, v: Any) -> Any:
    """`v` as `tp`, or _BAD. Nothing is converted, but an integer, and 3e-4 (a string in YAML 1.1), pass as numbers."""
    if typing.get_origin(tp) is typing.Literal:
        return v if any(v == a and type(v) is type(a) for a in typing.get_args(tp)) else _BAD
    if tp is float:
        number = type(v) in (int, float) or (
            isinstance(v, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)e[+-]?\d+", v, re.IGNORECASE)
        )
        with contextlib.suppress(OverflowError):  # an integer beyond all floats
            return float(v) if number and math.isfinite(float(v)) else _BAD
        return _BAD
    if tp in (dict, list, tuple):
        return v if isinstance(v, tp) else _BAD
    return v if type(v) is tp else _BAD


def _endless(tp: Any) -> bool:
    """Whether a list or tuple type is of any length."""
    return typing.get_origin(tp) is list or ... in typing.get_args(tp)


def describe(tp: Any) -> str:
    """A type in the words of the command line."""
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin is typing.Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin in (tuple, list):
        return "a list" if _endless(tp) else f"a list of {len(args)} values"
    if tp is types.NoneType:
        return "null"
    return _KINDS.get(origin or tp, getattr(tp, "__name__", str(tp)))


def _words(tp: Any) -> list[Any]:
    """The words that a value of this type may be, for hints."""
    if typing.get_origin(tp) is typing.Literal:
        return list(typing.get_args(tp))
    return [word for a in typing.get_args(tp) for word in _words(a)]


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key

"""JSON that a stranger wrote: bounded, complete, every name once, every number finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from txtrain.errors import ConfigError

LIMIT = 100_000_000  # bytes: the largest published index has a few million


def parse(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: it is cut off, no object, nested beyond reason, or says a name twice or a number that is none.
    """
    try:
        made = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_a_number)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{where} must be whole, valid JSON, but is not: {str(e) or type(e).__name__}.") from e
    if not isinstance(made, dict):
        raise ConfigError(f"{where} must be a JSON object, but is a {type(made).__name__} instead.")
    return made


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; see `parse`."""
    size = path.stat().st_size
    if size > LIMIT:
        raise ConfigError(f"{path} must be at most {LIMIT:,} bytes, but has {size:,}.")
    return parse(path.read_bytes(), str(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return made


def _not_a_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")

"""Regular expressions for names of parameters; they match anywhere in a name (re.search)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from txtrain.errors import hint


def pattern_problems(path: str, patterns: Sequence[str]) -> Iterator[str]:
    """Problems: patterns that are no regular expressions."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as e:
            yield f"`{path}` must be regular expressions, but {pattern!r} is not one: {e}."


def unfound(names: Collection[str], patterns: Mapping[str, str]) -> Iterator[str]:
    """Problems: patterns (by key) that match no name, and so would silently do nothing."""
    parts = [part for name in names for part in (name, *name.split("."))]
    for path, pattern in patterns.items():
        if not any(re.search(pattern, name) for name in names):
            nearest = hint(pattern, parts) or f" The first is {next(iter(names), 'missing')}."
            yield (
                f"`{path}` must be found in the name of a parameter, but {pattern!r} is in none of "
                f"{len(names)}.{nearest}"
            )

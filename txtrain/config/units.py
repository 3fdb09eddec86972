"""Sizes and durations in text form."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

UNITS = {"kb": 10**3, "kib": 2**10, "gb": 10**9, "gib": 2**30, "mb": 10**6, "mib": 2**20, "tb": 10**12, "tib": 2**40}


def bytes_of(text: str) -> int | None:
    """`80GB`, `79.6 GiB` in bytes, in small letters too; None: not a size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(\w+)\s*", text)
    unit = None if found is None else UNITS.get(found[2].casefold())
    size = math.nan if found is None or unit is None else float(found[1]) * unit
    return int(size) if math.isfinite(size) else None


def seconds_of(text: str) -> float:
    """`DD:HH:MM:SS` in seconds."""
    days, hours, minutes, seconds = map(int, text.split(":"))
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


def in_units(n: float, units: Sequence[tuple[float, str]]) -> str | None:
    """`5.3 M`: three digits in the largest unit of which there is one, as rounded; None: there is none.

    units: largest first.
    """
    for size, name in units:
        if float(f"{n / size:.3g}") >= 1:
            return f"{n / size:.3g} {name}" if n / size < 999.5 else f"{n / size:.0f} {name}"
    return None

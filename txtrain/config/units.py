"""Sizes and durations in text form."""

from __future__ import annotations

import re

UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20, "TB": 10**12, "TiB": 2**40}


def bytes_of(text: str) -> int | None:
    """`80GB`, `79.6 GiB` in bytes; None: not a size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(\w+)\s*", text)
    return None if found is None or found[2] not in UNITS else int(float(found[1]) * UNITS[found[2]])


def seconds_of(text: str) -> float:
    """`DD:HH:MM:SS` in seconds."""
    days, hours, minutes, seconds = map(int, text.split(":"))
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds

"""Which cases of a test run by default; the rest is for `pytest -m slow`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], by_default: Collection[Any]) -> list[Any]:
    """The cases for parametrize: those named run by default, every other is slow."""
    cases = list(cases)
    assert (missing := [case for case in by_default if case not in cases]) == [], missing
    return [case if case in by_default else pytest.param(case, marks=pytest.mark.slow) for case in cases]

"""Largest differences seen, by family and check; docs/parity.md is written from them when TXTRAIN_WRITE_DOCS=1 (without xdist)."""

import os
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.parity.every import EVERY
from tests.parity.report import write

ALLOWED = 1e-5
SEEN: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))


@pytest.fixture(autouse=True, scope="session")
def cache_elsewhere(tmp_path_factory):
    os.environ.setdefault("TXTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def record():
    """Note a difference, and fail beyond what is allowed."""

    def note(family: str, check: str, seen: float, allowed: float = ALLOWED) -> None:
        SEEN[check][family].append(seen)
        assert seen <= allowed, f"{family}: {check} differ by {seen:.1e}, allowed {allowed:.1e}"

    return note


def pytest_sessionfinish(session, exitstatus):
    if os.environ.get("TXTRAIN_WRITE_DOCS") == "1" and exitstatus == 0 and SEEN and not hasattr(session.config, "workerinput"):
        table = {check: {family: max(seen[family]) for family in EVERY if family in seen} for check, seen in SEEN.items()}
        write(Path(session.config.rootpath) / "docs" / "parity.md", table, EVERY)

"""The table of docs/distributed.md: what resumes into what. A cell is written when it has been measured, and stays until it is again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tests.compose.conftest import ROOT

PAGE = ROOT / "docs/distributed.md"
EXACT = "exact"
CORNER = "from \\ into"

# By name: strategy and number of processes. 3 divides the size of hardly any parameter.
LAYOUTS = {
    "one process": ("auto", 1),
    "ddp 2": ("ddp", 2),
    "ddp 3": ("ddp", 3),
    "fsdp 2": ("fsdp", 2),
    "fsdp 4": ("fsdp", 4),
    "hsdp 4": ("hsdp", 4),
    "tp 2": ("tp", 2),
    "fsdp_tp 4": ("fsdp_tp", 4),
    **{f"zero{stage} {n}": (f"deepspeed_stage_{stage}", n) for stage in (1, 2, 3) for n in (2, 3)},
}

Cells = dict[tuple[str, str], str]  # (from, into) -> `exact`, or the largest relative difference of a loss


def read(page: Path = PAGE) -> Cells:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in _lines(page.read_text())]
    header, rows = lines[0], lines[2:]  # a page that has no cell yet has the first line alone
    return {(row[0], into): cell for row in rows for into, cell in zip(header[1:], row[1:], strict=True) if cell}


def write(found: Mapping[tuple[str, str], str], page: Path = PAGE) -> None:
    """Beside the cells that are there."""
    text, cells = page.read_text(), read(page) | found
    made = [f"| {CORNER} | {' | '.join(LAYOUTS)} |", "|---" * (len(LAYOUTS) + 1) + "|"]
    made += [f"| {a} | {' | '.join(cells.get((a, b), '') for b in LAYOUTS)} |" for a in LAYOUTS]
    old = "\n".join(_lines(text))
    page.write_text(text.replace(old, "\n".join(made)))


def _lines(text: str) -> list[str]:
    found = re.search(rf"^\| {re.escape(CORNER)} .*(\n\|.*)*", text, re.MULTILINE)
    assert found, f"no table of {CORNER!r}"
    return found[0].splitlines()

"""The colours of `txtrain plan`, made without rich: as rich makes them."""

import io
import sys

import pytest
from rich.console import Console

from txtrain.cli.plan import _styled


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Screen, io.StringIO])
@pytest.mark.parametrize(
    "given", [{}, {"NO_COLOR": "1"}, {"FORCE_COLOR": "1"}, {"FORCE_COLOR": ""}, {"TERM": "dumb"}, {"TERM": "xterm-256color"}], ids=str
)
def test_titles_look_as_rich_would_print_them(monkeypatch, stream, given):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    shown = stream()
    Console(file=shown, highlight=False, soft_wrap=True).print("[bold]gpt2[/]: 1\n[bold cyan]model[/]")
    monkeypatch.setattr(sys, "stdout", stream())
    assert f"{_styled('gpt2', '1')}: 1\n{_styled('model', '1;36')}\n" == shown.getvalue()

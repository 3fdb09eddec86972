"""A screen that cannot be written to is no reason to stop."""

import sys

from txtrain.monitor.console import Display


class Full:
    """A terminal that was closed, a log on a full disk."""

    encoding = "utf-8"

    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        raise OSError(28, "No space left on device")

    def isatty(self):
        return False


def test_a_screen_that_is_full_or_gone_is_said_once_and_the_training_goes_on(monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        display = Display()
        for i in range(3):
            display.tell(f"step {i}")
    assert capfd.readouterr().err.count("txtrain: the screen cannot be written to ([Errno 28] No space left on device)") == 1
    display.tell("there again")
    assert capfd.readouterr().out == "there again\n"


def test_a_strangers_values_are_shown_and_not_executed_by_the_terminal(capsys):
    display = Display()
    display.tell("named \x1b]0;title\x07")
    display.line("a [/b] \x1b[2J")
    display.table([("data", "x\x1bc.txt")])
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert [line.strip() for line in said.splitlines()] == [r"named \x1b]0;title\x07", r"a [/b] \x1b[2J", r"data          x\x1bc.txt"]

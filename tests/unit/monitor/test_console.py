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

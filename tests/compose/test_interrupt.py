"""Ctrl-C at any moment of a start: one line, and never a traceback."""

import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.training import write_text
from txtrain.parallel.early_signals import EndsAtOnce

RUN = (
    *("data=text", "data.path=text.txt", "data.tokenizer=bytes", "model.vocab_size=257", "model.n_layers=2", "model.dim=32", "model.n_heads=2"),
    *("model.max_seq_len=32", "trainer.accelerator=cpu", "trainer.max_steps=1000000", "trainer.limit_val_batches=0"),
)
# A few milliseconds, behind Python's own start.
BEFORE_IT_CAN_ANSWER = {"__init__.py", "__main__.py", "parallel/__init__.py", "parallel/early_signals.py"}
PYTHON_IS_NOT_UP = ("Fatal Python error: init_", "Could not import runpy module")  # Ctrl-C while the interpreter itself starts: none of our code has run
ANSWERS = {1: r"txtrain: (interrupted|stopped before the first step)\.", 75: r"txtrain: SIGINT: stopping after this step; a checkpoint follows\."}


def interrupted(after: float) -> tuple[int, str]:
    """Exit code and stderr of a run that gets Ctrl-C so many seconds after its start."""
    child = subprocess.Popen([sys.executable, "-m", "txtrain", *RUN], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(after)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    return child.returncode, errors


def is_answered_with_one_line(after: float) -> int:
    code, errors = interrupted(after)
    frames = set(re.findall(r"/txtrain/(\S+\.py)", errors))
    if code == -signal.SIGINT or any(words in errors for words in PYTHON_IS_NOT_UP):
        assert frames <= BEFORE_IT_CAN_ANSWER, f"Ctrl-C after {after:.3f} s:\n{errors}"
        return -signal.SIGINT
    assert code in ANSWERS, f"Ctrl-C after {after:.3f} s: exit code {code}\n{errors}"
    assert "Traceback" not in errors, f"Ctrl-C after {after:.3f} s:\n{errors}"
    assert len(re.findall(ANSWERS[code], errors)) == 1, f"Ctrl-C after {after:.3f} s: exit code {code}\n{errors}"
    return code


def answers_at_moments(n: int, seconds: float = 3.0) -> set[int]:
    """A random moment of each of n equal parts of the first seconds."""
    return {is_answered_with_one_line(seconds * (i + random.random()) / n) for i in range(n)}


def test_ctrl_c_at_random_moments_of_the_start(clean_room):
    write_text(clean_room / "text.txt")
    assert 1 in answers_at_moments(6)


@pytest.mark.slow
def test_ctrl_c_at_many_random_moments_of_the_start(clean_room):
    write_text(clean_room / "text.txt")
    assert answers_at_moments(80, seconds=6.0) >= {1, 75}


def test_whoever_answers_ctrl_c_already_keeps_it():
    mine = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with EndsAtOnce():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, mine)
    with EndsAtOnce():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

"""Signals before there is anything to save."""

import json
import os
import signal
import sys

import pytest

from tests.unit.ground.test_slurm import commands  # noqa: F401  (a fixture)
from txtrain.parallel import early_signals


class Exit(BaseException):
    pass


@pytest.fixture
def stopped(monkeypatch, tmp_path, commands):  # noqa: F811
    """stopped("trainer.max_requeues=2") -> exit code of a SLURM job's fourth start that is stopped while it imports, and what scontrol is asked."""
    asked = commands(scontrol="exit 0")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("txtrain.ground.slurm._requeued", set())

    def leave(code):
        raise Exit(code)

    monkeypatch.setattr(os, "_exit", leave)

    def stop(*words):
        monkeypatch.setattr(sys, "argv", ["txtrain", *words])
        with pytest.raises(Exit) as left:
            early_signals._stop(signal.SIGTERM, None)
        return left.value.args[0], [line for line in asked() if line.startswith("scontrol")]

    return stop


def test_a_start_that_never_ends_its_imports_is_not_requeued_for_ever(stopped, capfd):
    assert stopped("model=gpt2") == (1, [])
    assert "Job 17 is not requeued: more starts in a row than trainer.max_requeues have kept no step." in capfd.readouterr().err


@pytest.mark.parametrize("word", ["trainer.auto_requeue=false", "trainer.auto_requeue=False", "++trainer.auto_requeue= FALSE"])
def test_a_start_is_not_requeued_against_the_users_word(word, stopped):
    assert stopped("trainer.max_requeues=4", word) == (75, [])


@pytest.mark.parametrize(
    "words",
    [("trainer.max_requeues=4",), ("run_dir=mine",), ("name=team/b*d/gpt2",), ("model=gpt2", "trainer.auto_requeue=True", "run_dir=mine"), ()],
    ids=["more are allowed", "progress", "progress under a name with slashes", "asked for", "a sweep's member"],
)
def test_else_it_is(words, stopped, tmp_path):
    for where in ("mine", "runs/team/b*d/gpt2/slurm-17"):
        (tmp_path / where).mkdir(parents=True)
        (tmp_path / where / "run.json").write_text(json.dumps({"progress": {"job": "17", "restarts": 1}}))
    assert stopped(*words) == (75, ["scontrol requeue 17"])


def test_what_cannot_be_written_any_more_is_let_go(monkeypatch):
    """A terminal that is gone, a full disk: Python's own end would make exit code 120 of it."""

    class Full:
        def flush(self):
            raise OSError("no space")

        def fileno(self):
            return 77

    gone = []
    before = {number: signal.getsignal(number) for number in early_signals.SIGNALS}
    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(early_signals, "_to_nowhere", gone.append)
    try:
        early_signals.nothing_is_left()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert gone == [77]


def test_a_process_that_was_started_without_standard_output_ends_as_others_do(monkeypatch):
    monkeypatch.setattr(early_signals, "SIGNALS", ())
    monkeypatch.setattr(sys, "stdout", None)
    early_signals.nothing_is_left()

"""Processes that live and die together: whoever is killed, stopped or fails is named, and nobody is left."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.distributed.group import alive
from txtrain import compose
from txtrain.cli import sweep
from txtrain.parallel import launch
from txtrain.parallel.launch import Group

ROOT = Path(__file__).parents[3]
SLEEPS = "exec sleep 60"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.1)
    monkeypatch.setattr(launch, "STOPPED", 0.3)


def ended(*scripts):
    """Exit code of a group of shells, after which none of them is there."""
    with Group() as group:
        for_each = [os.environ | {"RANK": str(rank), "DO": script} for rank, script in enumerate(scripts)]
        group.start(["sh", "-c", 'eval "$DO"'], for_each)
        pids = [child.pid for child in group._children]
        code = group.wait()
    assert not any(map(alive, pids))
    return code


@pytest.mark.parametrize(
    ("does", "said", "code"),
    [
        ("kill -KILL $$", "was killed by SIGKILL (by hand, or by the system where memory ran out: see dmesg): the others are ended.", 1),
        ("kill -SEGV $$", "was killed by SIGSEGV: the others are ended.", 1),
        ("kill -STOP $$; sleep 60", "has been stopped by SIGSTOP for 0 s: all are ended.", 1),
        ("exit 7", "failed with exit code 7: the others are ended.", 7),
    ],
)
def test_a_rank_that_fails_is_named_with_its_host_and_signal_and_ends_the_others(does, said, code, capfd):
    began = time.monotonic()
    assert ended(SLEEPS, does) == code
    assert time.monotonic() - began < 20
    told = capfd.readouterr().err
    assert told.count("txtrain:") == 1
    assert "txtrain: rank 1 (pid " in told
    assert f"on {socket.gethostname()}) {said}" in told


def test_the_cause_is_named_before_its_consequence(capfd):
    """Both are found at one look: the one that was killed, and the one that lost its connection by it."""
    with Group() as group:
        group.start(["sh", "-c", "test $RANK = 1 && kill -KILL $$; exit 1"], [os.environ | {"RANK": str(rank)} for rank in range(2)])
        for child in group._children:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert group.wait() == 1
    assert "rank 1 (pid" in capfd.readouterr().err


def test_a_run_that_is_suspended_as_a_whole_waits(capfd):
    with Group() as group:
        group.start(["sh", "-c", "kill -STOP $$; exit 0"], [dict(os.environ)] * 2)
        timer = threading.Timer(1.0, lambda: [os.kill(child.pid, signal.SIGCONT) for child in group._children])
        timer.start()
        assert group.wait() == 0
        timer.join()
    assert capfd.readouterr().err == ""


def test_a_hangup_that_is_ignored_stays_so_and_another_is_forwarded(monkeypatch):
    traps = "trap 'exit 5' HUP; while :; do sleep 0.05; done"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Group() as group:
            group.start(["sh", "-c", "sleep 0.5"], [dict(os.environ)])
            os.kill(os.getpid(), signal.SIGHUP)
            assert (group.wait(), group.received) == (0, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with Group() as group:
            group.start(["sh", "-c", traps], [dict(os.environ)])
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGHUP)
            assert (group.wait(), group.received) == (5, signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


PARENT = """
import os, signal
from txtrain.parallel.launch import Group
with Group() as group:
    saves = "trap 'echo > saved; exit 75' TERM; echo > begun; while :; do sleep 0.05; done"
    group.start(["sh", "-c", saves], [dict(os.environ)], orphaned=signal.SIGTERM)
    group.wait()
"""


def test_the_member_of_a_sweep_that_is_killed_saves_and_ends(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    for file, kills in (("begun", True), ("saved", False)):
        end = time.monotonic() + 60
        while not (tmp_path / file).exists():
            assert time.monotonic() < end, file
            time.sleep(0.02)
        if kills:
            parent.kill()
            parent.wait()


def test_a_rank_that_dies_while_it_is_looked_at_is_not_stopped():
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet reaped
    assert launch._stopped(child.pid) == 0
    child.wait()


@pytest.mark.parametrize("starts", [
    lambda: launch.launch(compose(["model=gpt2"]), lambda file: None, 2),
    lambda: sweep._start(Group(), "train", "config.yaml"),
])
def test_no_process_takes_a_module_from_the_current_folder(starts, tmp_path, monkeypatch):
    """It may be a stranger's. One on PYTHONPATH is the user's."""
    started = []
    monkeypatch.setattr(Group, "start", lambda self, command, *_, **__: started.append(command))
    monkeypatch.chdir(tmp_path)
    starts()
    (python,) = [command[: command.index("-m")] for command in started]
    (tmp_path / "random.py").write_text("print('ran')")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "chosen.py").write_text("print('chosen')")
    env = os.environ | {"PYTHONPATH": str(tmp_path / "mine")}
    done = subprocess.run([*python, "-c", "import random, chosen"], capture_output=True, text=True, env=env, timeout=60)
    assert (done.stdout, done.stderr) == ("chosen\n", "")


def test_a_checkout_that_is_not_installed_starts_itself(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert launch.python() == [sys.executable]

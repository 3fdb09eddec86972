"""Ranks that another launcher started: who is gone, stopped or silent is named; who is busy or has ended is not."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from txtrain.parallel import heartbeat
from txtrain.parallel.heartbeat import Heartbeat, _state

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def other():
    """A process on this machine, as rank 1."""
    child = subprocess.Popen(["sleep", "60"])
    yield child
    child.kill()
    child.wait()


def watched(pid, machine="here m", seconds=70, beats=lambda k: False):
    """What rank 0 of three says when rank 1, a process on the machine, beats at the looks that `beats` says."""
    store = dist.HashStore()
    for rank, who in enumerate([["here m", os.getpid()], [machine, pid], ["there m", 1]]):
        store.set(f"who/{rank}", json.dumps(who))
        store.set(f"beat/{rank}", "[0, {}]")
    mine = Heartbeat(0, 3, store)
    for k in range(seconds // 5):
        store.set("beat/2", json.dumps([k, {}]))
        if beats(k):
            store.set("beat/1", json.dumps([k, {}]))
        if why := mine._beat(store, 5.0):
            return k * 5, why
    return None


@linux
def test_a_rank_that_was_killed_is_named_at_the_next_look(other):
    other.kill()
    while _state(other.pid) != "gone":
        time.sleep(0.01)
    assert watched(other.pid) == (0, f"rank 1 (pid {other.pid} on here) was killed (by hand, or by the system where memory ran out: see dmesg)")


@linux
def test_a_rank_that_is_stopped_is_named_after_a_minute_without_a_beat(other):
    other.send_signal(signal.SIGSTOP)
    while _state(other.pid) != "stopped":
        time.sleep(0.01)
    assert watched(other.pid) == (60, f"rank 1 (pid {other.pid} on here) has been stopped by a signal (SIGSTOP) for 60 s")
    assert watched(other.pid, beats=lambda k: k % 6 == 0) is None, "a debugger stops it now and then"


@linux
def test_a_rank_that_is_busy_is_waited_for(other):
    assert watched(other.pid, seconds=600) is None


def test_a_rank_on_another_machine_that_is_silent_with_all_its_neighbours_is_named():
    assert watched(7, "away m", seconds=90) == (60, "rank 1 (pid 7 on away) has not answered for 60 s")
    assert watched(7, "there m", seconds=600) is None, "rank 2, beside it, beats and sees it run"


@linux
def test_a_rank_that_has_ended_in_order_is_not_missed(other):
    store, beating = dist.HashStore(), Heartbeat(1, 2, dist.HashStore())
    with beating:
        assert dist.PrefixStore(beating._prefix, beating.base).get("beat/1") == b"[0, {}]"
    assert dist.PrefixStore(beating._prefix, beating.base).get("beat/1") == b""
    store.set("beat/1", "")
    other.kill()
    other.wait()
    store.set("who/0", json.dumps(["here m", os.getpid()]))
    store.set("who/1", json.dumps(["here m", other.pid]))
    assert Heartbeat(0, 2, store)._beat(store, 5.0) == ""


def test_one_tells_and_all_end(monkeypatch, capfd):
    store, left = dist.HashStore(), []
    monkeypatch.setattr(heartbeat, "BEAT", 0.0)
    monkeypatch.setattr(heartbeat.os, "_exit", left.append)
    for rank in (0, 1, 2):
        Heartbeat(rank, 3, store)._end(store, "rank 9 was killed")
    assert left == [1, 1, 1]
    assert capfd.readouterr().err == "\ntxtrain: rank 9 was killed: all are ended.\n"

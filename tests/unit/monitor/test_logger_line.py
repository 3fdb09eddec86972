"""A logger's thread: order, failures, slowness, the end."""

import re
import threading
import time

import pytest

from txtrain.monitor.loggers.line import Line, within


def test_events_are_done_in_order_and_before_the_end():
    done, said = [], []
    line = Line("x", lambda: done.append("first"), said.append)
    for i in range(100):
        line.put(lambda i=i: done.append(i))
    assert line.close(lambda: done.append("last"), patience=60)
    assert (done, said) == (["first", *range(100), "last"], [])


def test_a_failure_is_said_once_and_the_next_event_is_done():
    done, said = [], []

    def fail():
        raise OSError("no\nroute to host")

    line = Line("x", lambda: None, said.append)
    for event in (fail, lambda: done.append(1), fail, lambda: done.append(2)):
        line.put(event)
    assert line.close(lambda: None, patience=60)
    assert (done, line.failed) == ([1, 2], 2)
    assert said == [
        "logger x failed: OSError: no route to host. The training goes on; further failures of it are not shown.",
        "logger x: 4 entries were done, 2 failed, 0 were dropped.",
    ]


def test_nothing_is_done_after_a_first_event_that_failed():
    done, said = [], []
    line = Line("x", lambda: 1 / 0, said.append)
    line.put(lambda: done.append(1))
    assert line.close(lambda: done.append(2), patience=60)
    assert (done, len(said)) == ([], 1)
    assert "ZeroDivisionError" in said[0]


def test_a_slow_logger_delays_nobody_drops_its_oldest_entries_and_is_left_behind():
    done, said, let_go = [], [], threading.Event()
    line = Line("x", let_go.wait, said.append, limit=10)
    start = time.monotonic()
    for i in range(1000):
        line.put(lambda i=i: done.append(i))
    assert time.monotonic() - start < 5  # nobody waited for it: it waits for us
    assert line.dropped == 990
    assert said == ["logger x cannot keep up: more than 10 of its entries wait, the oldest are dropped. The training goes on."]
    assert not line.close(lambda: None, patience=0.1)
    assert said[1] == "logger x has not finished after 0 s, with 10 entries waiting: the run ends without it."
    assert said[2:] == ["logger x: 0 entries were done, 0 failed, 991 were dropped."]
    let_go.set()


def test_a_logger_that_hangs_is_dropped_and_the_end_does_not_wait_for_it(monkeypatch):
    monkeypatch.setattr("txtrain.monitor.loggers.line.HANGS", 0.2)
    done, said, let_go = [], [], threading.Event()
    line = Line("x", lambda: None, said.append)
    line.put(lambda: time.sleep(0.3), patience=60)  # a checkpoint may be uploaded
    line.put(let_go.wait)
    while line.done < 2:
        time.sleep(0.01)
    line.put(lambda: done.append(1))
    assert said == []
    time.sleep(0.4)
    line.put(lambda: done.append(2))
    assert said == ["logger x has not answered for 0 s: it is dropped. The training goes on."]
    began = time.monotonic()
    assert not line.close(lambda: done.append(3), patience=60)
    assert time.monotonic() - began < 30
    assert said[1:] == ["logger x: 2 entries were done, 0 failed, 1 were dropped."]
    let_go.set()
    line._thread.join(10)
    assert done == [], "nothing more is done"


def test_a_slow_logger_is_said_once_with_its_share_of_the_time(monkeypatch):
    monkeypatch.setattr("txtrain.monitor.loggers.line.WATCHED", 0.1)
    said = []
    line = Line("x", lambda: None, said.append)
    for _ in range(8):
        line.put(lambda: time.sleep(0.1))
        time.sleep(0.05)
    assert line.close(lambda: None, patience=60)
    (once,) = said
    share, each = re.fullmatch(r"logger x is slow: it works (\d+)% of the time, ([\d.e-]+) s for an entry. The training does not wait for it.", once).groups()
    assert 50 <= int(share) <= 100
    assert 0.01 < float(each) < 1


def test_what_may_hang_is_waited_for_so_long():
    assert within(60, lambda: 3) == 3
    with pytest.raises(KeyError):
        within(60, lambda: {}["x"])
    with pytest.raises(TimeoutError, match="no answer for 0 s"):
        within(0.1, lambda: time.sleep(5))


def test_a_line_knows_its_own_thread():
    seen = []
    line = Line("x", lambda: None, lambda _: None)
    line.close(lambda: seen.append(line.is_here), patience=60)
    assert (seen[-1], line.is_here) == (True, False)

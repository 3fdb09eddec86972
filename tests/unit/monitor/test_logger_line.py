"""A logger's thread: order, failures, slowness, the end."""

import threading
import time

from txtrain.monitor.loggers.line import Line


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
    assert said == ["logger x failed: OSError: no route to host. The training goes on; further failures of it are not shown."]


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
    let_go.set()


def test_a_line_knows_its_own_thread():
    seen = []
    line = Line("x", lambda: None, lambda _: None)
    line.close(lambda: seen.append(line.is_here), patience=60)
    assert (seen[-1], line.is_here) == (True, False)

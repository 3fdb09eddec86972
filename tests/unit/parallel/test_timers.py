import threading

import pytest
import torch

from txtrain.parallel.timers import PHASES, DeviceClock, HostClock, Phases


class Ticks:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now

    def seconds(self, a, b):
        return b - a


def begun(clock):
    phases = Phases()
    phases.start(torch.device("cpu"), clock)
    return phases


def spent(taken):
    return {name: seconds for name, seconds in taken.items() if seconds}


def test_a_phase_counts_without_those_within_it():
    clock = Ticks()
    phases = begun(clock)
    phases.enter("data")
    clock.now += 1
    phases.enter("forward_backward")
    clock.now += 2
    with phases.within("communication"):
        clock.now += 4
        with phases.within("communication"):
            clock.now += 8
    clock.now += 16
    phases.enter("optimizer")
    clock.now += 32
    taken = phases.take()
    assert tuple(taken) == PHASES
    assert spent(taken) == {"data": 1, "forward_backward": 18, "communication": 12, "optimizer": 32}
    clock.now += 64
    assert spent(phases.take()) == {"optimizer": 64}, "the phase goes on over a row"


def test_validation_and_saving_are_not_divided():
    clock = Ticks()
    phases = begun(clock)
    for whole in ("validation", "saving"):
        with phases.within(whole):
            clock.now += 1
            with phases.within("communication"):
                clock.now += 1
    assert spent(phases.take()) == {"validation": 2, "saving": 2}


def test_an_exception_leaves_the_phase():
    clock = Ticks()
    phases = begun(clock)
    with pytest.raises(KeyError), phases.within("saving"):
        raise KeyError
    clock.now += 1
    assert spent(phases.take()) == {"other": 1}


def test_nothing_is_noted_before_the_start_and_by_other_threads():
    phases = Phases()
    phases.enter("data")
    with phases.within("communication"):
        pass
    assert spent(phases.take()) == {}
    clock = Ticks()
    phases.start(torch.device("cpu"), clock)
    thread = threading.Thread(target=phases.enter, args=("saving",))
    thread.start()
    thread.join()
    clock.now += 1
    assert spent(phases.take()) == {"other": 1}


def test_many_borders_are_added_up_on_the_way():
    clock = Ticks()
    phases = begun(clock)
    for _ in range(5000):
        phases.enter("data")
        clock.now += 1
        assert len(phases._borders) <= 1025
    assert spent(phases.take()) == {"data": 5000}


def test_the_hosts_clock_adds_up_to_what_has_passed():
    clock = HostClock()
    phases = Phases()
    first = clock.mark()
    phases.start(torch.device("cpu"))
    for name in PHASES * 3:
        phases.enter(name)
        sum(range(10000))
    taken = phases.take()
    assert 0.5 * clock.seconds(first, clock.mark()) < sum(taken.values()) <= clock.seconds(first, clock.mark())
    assert all(taken.values())


def test_on_a_gpu_events_are_waited_for_only_when_they_are_added_up(monkeypatch):
    now, waited = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            waited.append(self.at)

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    phases = begun(DeviceClock())
    phases.enter("forward_backward")
    now[0] += 1500.0  # milliseconds
    phases.enter("optimizer")
    now[0] += 500.0
    assert not waited
    assert spent(phases.take()) == {"forward_backward": 1.5, "optimizer": 0.5}

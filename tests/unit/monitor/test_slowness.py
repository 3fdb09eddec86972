import dataclasses as dc

import pytest

from txtrain.monitor.slowness import RULES, Stretch, reasons
from txtrain.parallel.config import Layout

FINE = Stretch(
    seconds={"data": 0.5, "forward_backward": 25.0, "optimizer": 3.0, "communication": 2.0, "validation": 9.0, "saving": 9.0, "other": 9.0},
    steps=50,
    mfu=0.4,
    on_gpu=True,
    processes=8,
    micro_batch_size=8,
    share=32,
    micro_batch_tokens=8192,
    num_workers=2,
    cores=8,
)


def like(seconds=None, **changes):
    return dc.replace(FINE, seconds={**FINE.seconds, **(seconds or {})}, **changes)


def test_a_run_that_is_not_slow_is_left_alone():
    assert reasons(FINE, set()) == []


@pytest.mark.parametrize(
    ("stretch", "says"),
    [
        (like({"data": 15.0}), ["33% of a step is waiting for data", "data.num_workers=4", "(now 2)"]),
        (like({"data": 15.0}, num_workers=0), ["data.num_workers=2", "(now 0)"]),
        (like({"data": 15.0}, num_workers=7), ["txtrain prepare", "data=memmap"]),
        (like({"data": 15.0}, num_workers=0, cores=1), ["data.num_workers=1"]),
        (like(mfu=0.08, micro_batch_size=1, micro_batch_tokens=1024), ["micro-batches of 1", "MFU 8%", "data.micro_batch_size=4", "8 instead of 32"]),
        (like(mfu=0.08, micro_batch_size=1, micro_batch_tokens=64), ["data.micro_batch_size=32", "in 1 instead of 32"]),
        (like(compiled_again=3), ["compiled again", "trainer.compile=false"]),
        (like({"communication": 20.0}, layout=Layout(replicate=8)), ["41% of a step is communication", "data.global_batch_size"]),
        (like({"communication": 20.0}, layout=Layout(shard=8), reshards=True), ["strategy.reshard_after_forward=false"]),
        (like({"communication": 20.0}, layout=Layout(shard=8), reshards=False), ["strategy=ddp"]),
        (like({"communication": 20.0}, layout=Layout(shard=8)), ["strategy=ddp"]),
        (like({"communication": 20.0}, layout=Layout(tensor=8)), ["strategy.tp_size"]),
    ],
)
def test_the_likely_reason_and_the_key(stretch, says):
    (text,) = reasons(stretch, set())
    assert text.startswith("slow: ")
    for part in says:
        assert part in text, text


def test_each_cause_is_told_once():
    told = set()
    slow = like({"data": 15.0, "communication": 20.0})
    assert len(reasons(slow, told)) == 2
    assert told == {"data", "communication"}
    assert reasons(slow, told) == []
    assert len(reasons(like({"data": 15.0}, compiled_again=9), told)) == 1


def test_nothing_is_said_of_a_few_steps_or_of_no_time():
    assert reasons(like({"data": 15.0}, steps=19), set()) == []
    assert reasons(Stretch({"data": 5.0}, 100, 0.1, True, 1, 1, 8, 8, 0, 8), set()) == []


def test_what_has_no_cure_is_no_reason():
    assert reasons(like(mfu=0.01, micro_batch_size=32, micro_batch_tokens=128), set()) == [], "the whole share at once already"
    assert reasons(like({"communication": 20.0}, processes=1), set()) == []
    assert reasons(like(mfu=0.1, micro_batch_size=1, micro_batch_tokens=1024, on_gpu=False), set()) == [], "enough for a processor"


def test_no_rule_fails_without_times():
    empty = Stretch({}, 0, 0.0, False, 1, 1, 1, 1, 0, 1)
    assert [rule(empty) for rule in RULES.values()] == [None] * len(RULES)

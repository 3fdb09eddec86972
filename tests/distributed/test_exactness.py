"""k steps, stop, resume = the uninterrupted run, bit for bit, whatever is trained and however."""

import json

import pytest

import txtrain
from tests.distributed.callbacks import named
from tests.distributed.choices import CHOICES, STEPS, allowed, overrides
from tests.distributed.covering import covering
from tests.training import rows, weights
from txtrain.checkpoint import locate, read_state

VALUES = {name: [*choices] for name, choices in CHOICES.items()}
EACH = covering(VALUES, allowed, together=1)


def title(case):
    return ", ".join(value for value in case.values() if value not in ("none", "one", "concat"))


def stop_of(i):
    """Steps done when the signal comes; 3 and 6 are validated."""
    return 2 + i % 5


def assert_same(whole, parts, what, stop):
    assert json.loads((parts / "run.json").read_text())["status"] == "complete"
    one, other = rows(whole), rows(parts)
    assert [int(row["step"]) for row in one] == [*range(1, STEPS + 1)]
    different = [(a["step"], name, a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a if a[name] != b[name]]
    assert not different, f"{what}, stopped after {stop}: {different[:3]}"
    one, other = weights(whole), weights(parts)
    assert one.keys() == other.keys()
    different = [name for name in one if one[name] != other[name]]
    assert not different, f"{what}, stopped after {stop}: {len(different)} of {len(one)} tensors differ, {different[:3]}"
    assert read_state(locate(whole))["data_order_hash"] == read_state(locate(parts))["data_order_hash"]
    assert (whole / "samples.txt").read_text() == (parts / "samples.txt").read_text(), what


def alone(case, folder, stop):
    parts = txtrain.compose(overrides(case, folder, "parts"))
    assert txtrain.train(parts, callbacks=[named(f"SIGTERM {stop - 1} 0")]).status == "preempted"
    assert read_state(locate(folder / "parts"))["step"] == stop
    txtrain.train(parts)
    txtrain.train(txtrain.compose(overrides(case, folder, "whole")))
    assert_same(folder / "whole", folder / "parts", title(case), stop)


@pytest.mark.parametrize("i", range(len(EACH)), ids=lambda i: title(EACH[i]))
def test_one_process_stopped_and_continued_is_the_uninterrupted_run(i, tmp_path):
    """Every choice at least once."""
    alone(EACH[i], tmp_path, stop_of(i))


def test_every_choice_is_met():
    """The lists of choices are complete: what the registry has and is not here would be unproved."""
    from txtrain.registry import TABLE

    for group, mine in (("objective", "objective"), ("optimizer", "optimizer"), ("scheduler", "schedule")):
        here = {name.split(" +")[0] for name in VALUES[mine]}
        assert here == {name for name, option in TABLE[group].items() if option.config.__module__.startswith("txtrain.")}, group
    for name, values in VALUES.items():
        assert {case[name] for case in EACH} == set(values)

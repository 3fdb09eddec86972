"""k steps, stop, resume = the uninterrupted run, bit for bit, whatever is trained and however."""

import json

import pytest

import txtrain
from tests.cases import some
from tests.distributed.callbacks import named
from tests.distributed.choices import CHOICES, STEPS, STRATEGIES, allowed, overrides
from tests.distributed.covering import covering
from tests.distributed.group import Case, train
from tests.training import rows, weights
from txtrain.checkpoint.format import locate, read_state

VALUES = {name: [*choices] for name, choices in CHOICES.items()}
EACH = covering(VALUES, allowed, together=1)
PAIRS = covering(VALUES, allowed, together=2)
TOGETHER = covering(VALUES | {"strategy": [*STRATEGIES]}, allowed, together=2)
CHUNK = 8  # cases of several processes a launch


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
    assert read_state(locate(whole)).data_order_hash == read_state(locate(parts)).data_order_hash
    assert (whole / "samples.txt").read_text() == (parts / "samples.txt").read_text(), what


def alone(case, folder, stop):
    parts = txtrain.compose(overrides(case, folder, "parts"))
    assert txtrain.train(parts, callbacks=[named(f"SIGTERM {stop - 1} 0")]).status == "preempted"
    assert read_state(locate(folder / "parts")).step == stop
    txtrain.train(parts)
    txtrain.train(txtrain.compose(overrides(case, folder, "whole")))
    assert_same(folder / "whole", folder / "parts", title(case), stop)


@pytest.mark.parametrize("i", some(range(len(EACH)), range(3)), ids=lambda i: title(EACH[i]))
def test_one_process_stopped_and_continued_is_the_uninterrupted_run(i, tmp_path):
    """Every choice at least once."""
    alone(EACH[i], tmp_path, stop_of(i))


@pytest.mark.slow
@pytest.mark.parametrize("i", range(len(PAIRS)), ids=lambda i: title(PAIRS[i]))
def test_so_is_it_for_every_two_choices(i, tmp_path):
    alone(PAIRS[i], tmp_path, stop_of(i))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(0, len(TOGETHER), CHUNK))
def test_two_processes_stopped_and_continued_are_the_uninterrupted_run(chunk, tmp_path):
    """Every two choices, the strategy among them, in one run."""
    cases = {i: TOGETHER[i] for i in range(chunk, min(chunk + CHUNK, len(TOGETHER)))}
    wholes = {f"{title(case)}": Case(overrides(case, tmp_path, f"{i}-whole", 2)) for i, case in cases.items()}
    parts = {i: overrides(case, tmp_path, f"{i}-parts", 2) for i, case in cases.items()}
    stopped = {f"{title(cases[i])}, stopped": Case(run, [f"SIGTERM {stop_of(i) - 1} {i % 2}"]) for i, run in parts.items()}
    train(wholes | stopped, 2, tmp_path / "first", timeout=1800)
    for i in cases:
        assert read_state(locate(tmp_path / f"{i}-parts")).step == stop_of(i), title(cases[i])
    train({f"{title(cases[i])}, continued": Case(run) for i, run in parts.items()}, 2, tmp_path / "second", timeout=1800)
    for i, case in cases.items():
        assert_same(tmp_path / f"{i}-whole", tmp_path / f"{i}-parts", title(case), stop_of(i))


def read_samples(folder, name):
    """(step, index, hash) of every sample that any process has read; of processes that share matrices all read the same."""
    return {tuple(line.split()) for path in folder.glob(f"{name}-?") for line in path.read_text().splitlines()}


@pytest.mark.slow
def test_another_number_of_processes_and_another_micro_batch_read_the_same_samples_with_the_same_draws(tmp_path):
    """Masks, spans, pairs and crops included: 3 steps on one process, then 5 on two."""
    half, runs, cases = 3, {}, {}
    for objective in CHOICES["objective"]:
        case = {name: values[0] for name, values in VALUES.items()} | {"objective": objective}
        moved = overrides(case, tmp_path, f"{objective}, moved")
        for run, given in ((f"{objective}, whole", []), (f"{objective}, moved", [f"trainer.max_steps={half}", "data.micro_batch_size=2"])):
            given = [*overrides(case, tmp_path, run), *given]
            txtrain.train(txtrain.compose(given), callbacks=[named(f"SAMPLES {tmp_path / run}")])
        strategy = [*STRATEGIES][len(runs) % len(STRATEGIES)]
        runs[objective] = strategy
        cases[objective] = Case(
            [*moved, "trainer.devices=2", f"strategy={strategy}", "data.micro_batch_size=1", "resume_allow=[scheduler]"],
            [f"SAMPLES {tmp_path / f'{objective}, moved'}"],
        )
    train(cases, 2, tmp_path / "group", timeout=1800)
    for objective, strategy in runs.items():
        one, other = read_samples(tmp_path, f"{objective}, whole"), read_samples(tmp_path, f"{objective}, moved")
        assert len(one) == STEPS * 8, "the hash of a sample is not unique"
        assert one == other, f"{objective}, {strategy}: {len(one - other)} of {len(one)} samples differ"


def test_every_choice_is_met():
    """The lists of choices are complete: what the registry has and is not here would be unproved."""
    from txtrain.registry import TABLE

    elsewhere = {"grpo", "answers", "cloze", "multiple_choice"}  # of its own test, tests/unit/objectives/test_grpo.py; not trained
    for group, mine in (("objective", "objective"), ("optimizer", "optimizer"), ("scheduler", "schedule")):
        here = {name.split(" +")[0] for name in VALUES[mine]}
        assert here == {name for name, option in TABLE[group].items() if option.config.__module__.startswith("txtrain.")} - elsewhere, group
    for name, values in VALUES.items():
        assert {case[name] for case in EACH} == set(values)

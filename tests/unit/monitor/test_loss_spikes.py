import dataclasses as dc
import json
import random

import pytest

from txtrain.checkpoint.state import LossState
from txtrain.monitor.loss_spikes import ENOUGH, Losses


def curve(n, noise, seed=0, start=10.0, end=3.0):
    """A loss that falls as they do."""
    draws = random.Random(seed)
    return [end + (start - end) / (1 + i / 40) + draws.gauss(0, noise) for i in range(n)]


def spikes(losses, watch=None):
    watch = watch or Losses()
    return [found for step, loss in enumerate(losses, start=1) if (found := watch.add(step, loss))]


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1, 0.4])
@pytest.mark.parametrize("seed", range(5))
def test_a_falling_and_noisy_loss_has_none(noise, seed):
    assert spikes(curve(2000, noise, seed)) == []


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1])
def test_a_jump_is_found_at_its_step(noise):
    losses = curve(600, noise)
    losses[400] += 2.0
    (found,) = spikes(losses)
    assert (found.step, found.loss, found.first) == (401, losses[400], True)
    assert found.median == pytest.approx(sorted(losses[336:400])[32])


def test_a_jump_that_lasts_is_one_story_and_soon_the_rule():
    watch = Losses()
    losses = [3.0 + 0.01 * (i % 5) for i in range(100)] + [5.0 + 0.01 * (i % 5) for i in range(100)]
    found = spikes(losses, watch)
    assert [s.first for s in found] == [True] + [False] * (len(found) - 1)
    assert 20 <= len(found) <= 64
    assert watch.n_spikes == len(found)


def test_nothing_is_said_before_enough_has_been_seen():
    assert spikes([3.0] * (ENOUGH - 1) + [30.0]) == []
    assert len(spikes([3.0] * ENOUGH + [30.0])) == 1


def test_what_is_not_finite_is_none_and_changes_nothing():
    losses = curve(200, 0.05)
    with_holes = losses[:100] + [float("nan"), float("inf")] + losses[100:]
    plain, holed = Losses(), Losses()
    assert spikes(losses, plain) == spikes(with_holes, holed) == []
    assert plain.state() == holed.state()


@pytest.mark.parametrize("stop", [1, 31, 32, 150, 399, 401, 450])
def test_a_state_through_json_goes_on_exactly(stop):
    losses = curve(400, 0.05) + [20.0 + i % 3 for i in range(150)]
    whole = Losses()
    expected = spikes(losses, whole)
    first = Losses()
    before = spikes(losses[:stop], first)
    second = Losses(LossState(**json.loads(json.dumps(dc.asdict(first.state())))))
    after = [s for step, loss in enumerate(losses[stop:], start=stop + 1) if (s := second.add(step, loss))]
    assert before + after == expected
    assert second.state() == whole.state()


def test_a_run_that_loses_what_it_learnt_is_far_off_until_it_finds_it_again():
    watch = Losses()
    spikes(curve(500, 0.05), watch)
    assert watch.far_off == 0
    spikes([7.0] * 120, watch)
    assert watch.far_off == 120
    spikes([3.5], watch)
    assert watch.far_off == 0


@pytest.mark.parametrize(
    "losses",
    [
        [2.1 - i / 10000 for i in range(1000)] + [2.5] * 300,  # a fine-tuning that gets worse
        [3.5 / (1 + i) ** 2 for i in range(1000)] + [0.01] * 300,  # a task that is solved: many times nearly nothing
        [-1.0 - i / 1000 for i in range(500)] + [3.0] * 300,  # a reward: nothing is known of its scale
    ],
)
def test_what_only_looks_like_it_is_not(losses):
    watch = Losses()
    spikes(losses, watch)
    assert watch.far_off == 0

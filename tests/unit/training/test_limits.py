import pytest

from tests.training import tiny
from txtrain.config.units import seconds_of
from txtrain.training.limits import Limits


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        (["trainer.max_steps=7"], 7),
        (["trainer.max_steps=null", "trainer.max_epochs=2"], 26),  # ceil(2 * 101 / 8)
        (["trainer.max_steps=null", "trainer.max_tokens=1000"], 4),  # 8 x 32 tokens a step
        (["trainer.max_steps=7", "trainer.max_tokens=1000", "trainer.max_epochs=1"], 4),
        (["trainer.max_steps=null", "trainer.max_epochs=3", "trainer.overfit_batches=2"], 6),
        (["trainer.max_steps=null", "trainer.max_time=00:00:01:00"], None),
    ],
)
def test_the_first_limit_ends_the_run(tmp_path, given, steps):
    assert Limits.of(tiny(tmp_path, *given), n_train=101).steps == steps


def test_time_is_days_hours_minutes_seconds():
    assert seconds_of("01:02:03:04") == 86400 + 2 * 3600 + 3 * 60 + 4
    limits = Limits(steps=None, seconds=10.0)
    assert (limits.reached(10**9, 9.9), limits.reached(0, 10.0)) == (False, True)
    assert (Limits(5, None).reached(4, 1e9), Limits(5, None).reached(5, 0.0)) == (False, True)

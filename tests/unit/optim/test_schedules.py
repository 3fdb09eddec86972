"""The learning rate as a function of the step."""

import math
import os
import shutil
import signal

import lightning.pytorch as pl
import pytest

from tests.training import rows, tiny, weights
from txtrain.errors import ConfigError
from txtrain.optim.config import InverseSqrtConfig, SchedulerConfig, WSDConfig
from txtrain.registry import TABLE, make, out_of_range
from txtrain.training.run import train


def schedule(kind, total=100, **knobs):
    return make("scheduler", TABLE["scheduler"][kind].config(type=kind, **knobs), total_steps=total)


def test_schedules_have_the_values_of_their_definitions():
    constant, linear, cosine = (schedule(kind, warmup_steps=10, min_lr_ratio=0.1) for kind in ("constant", "linear", "cosine"))
    for each in (constant, linear, cosine):
        assert [each(1), each(5), each(10)] == [0.1, 0.5, 1.0]
    assert constant(100) == 1.0
    assert linear(55) == pytest.approx(0.1 + 0.9 * 0.5)
    assert cosine(40) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert linear(100) == cosine(100) == pytest.approx(0.1)
    assert cosine(101) == pytest.approx(0.1), "beyond the last step the rate must not rise again"


def test_a_schedule_without_warm_up_or_shorter_than_it_is_defined():
    assert schedule("cosine", total=4)(4) == pytest.approx(0)
    assert schedule("linear", total=5, warmup_steps=50)(5) == 0.1


def test_the_inverse_root_is_the_transformers_and_with_a_timescale_t5s():
    transformer, peak = schedule("inverse_sqrt", total=None, warmup_steps=40), 512**-0.5 * 40**-0.5
    for step in (1, 17, 40, 41, 1000):
        published = 512**-0.5 * min(step**-0.5, step * 40**-1.5)  # equation 3 of 1706.03762
        assert peak * transformer(step) == pytest.approx(published, rel=1e-12)
    t5 = schedule("inverse_sqrt", total=None, timescale=100)
    for step in (1, 99, 100, 101, 5000):
        assert 0.1 * t5(step) == pytest.approx(1 / math.sqrt(max(step, 100)), rel=1e-12)
    assert schedule("inverse_sqrt", min_lr_ratio=0.5)(100) == 0.5


@pytest.mark.parametrize(("decay_type", "middle"), [("linear", 0.5), ("1-sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)])
def test_wsd_is_stable_until_its_decay(decay_type, middle):
    by_steps = schedule("wsd", warmup_steps=10, min_lr_ratio=0.1, decay_steps=20, decay_type=decay_type)
    by_ratio = schedule("wsd", warmup_steps=10, min_lr_ratio=0.1, decay_ratio=0.2, decay_type=decay_type)
    for each in (by_steps, by_ratio):
        assert [each(1), each(10), each(45), each(80)] == [0.1, 1.0, 1.0, 1.0]
        assert each(90) == pytest.approx(0.1 + 0.9 * middle)
        assert each(100) == each(101) == pytest.approx(0.1)


def test_a_decay_longer_than_the_run_begins_after_the_warm_up():
    each = schedule("wsd", total=20, warmup_steps=10, decay_steps=1000, decay_type="linear")
    assert [each(10), each(15), each(20)] == [1.0, 0.5, 0.0]
    assert schedule("wsd", decay_steps=0)(100) == 1.0


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_a_schedule_that_needs_the_end_says_so(kind):
    with pytest.raises(ConfigError, match=f"is {kind} instead"):
        schedule(kind, total=None)
    assert schedule("constant", total=None)(10**6) == 1.0


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (InverseSqrtConfig(type="inverse_sqrt", warmup_steps=10, timescale=9), "`scheduler.timescale` must be at least 10"),
        (InverseSqrtConfig(type="inverse_sqrt", timescale=0), "`scheduler.timescale` must be at least 1"),
        (WSDConfig(type="wsd", decay_steps=-1), "`scheduler.decay_steps` must be at least 0 or null"),
        (WSDConfig(type="wsd", decay_ratio=1.1), "`scheduler.decay_ratio` must be at least 0 and at most 1, but is 1.1"),
        (WSDConfig(type="wsd", warmup_steps=-1), "`scheduler.warmup_steps`"),
        (SchedulerConfig(type="constant", min_lr_ratio=2.0), "`scheduler.min_lr_ratio`"),
    ],
)
def test_values_that_are_no_schedule_are_refused(config, says):
    (problem,) = [*out_of_range(config, "scheduler")] or config.check()
    assert says in problem


class Stop(pl.Callback):
    """Ends a run as Ctrl-C does, after the step that is under way."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_decays_that_leave_one_stable_run_equal_the_runs_that_had_them_from_the_start(tmp_path):
    wsd = ("scheduler=wsd", "scheduler.warmup_steps=2", "scheduler.decay_steps=3")

    def config(run, steps):
        return tiny(tmp_path, *wsd, f"run_dir={tmp_path / run}", f"trainer.max_steps={steps}", "trainer.val_check_interval=100", "save.every_n_steps=100")

    stable = train(config("stable", 100), callbacks=[Stop(5)])
    assert stable.status == "preempted"
    for steps in (9, 10, 12):
        shutil.copytree(tmp_path / "stable", tmp_path / f"decayed-{steps}")
        train(config(f"decayed-{steps}", steps))
        train(config(f"whole-{steps}", steps))
        assert rows(tmp_path / f"decayed-{steps}") == rows(tmp_path / f"whole-{steps}")
        assert weights(tmp_path / f"decayed-{steps}") == weights(tmp_path / f"whole-{steps}")
        rates = [float(row["lr"]) for row in rows(tmp_path / f"whole-{steps}")]
        assert rates[: steps - 3] == [0.005, *[0.01] * (steps - 4)], "stable until the last three steps"
        assert rates[-1] == 0

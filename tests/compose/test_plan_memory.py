"""`txtrain plan`: memory, fit, and what makes a model fit."""

import resource
import subprocess
import sys

import pytest

import txtrain
from tests.compose.test_plan import WITHOUT_TORCH, plan
from txtrain.cli.main import main
from txtrain.errors import ConfigError

SHARDED = ("strategy=fsdp", "trainer.precision=bf16-mixed")


def test_the_largest_model_is_laid_over_256_devices_in_two_seconds_without_torch():
    command = [sys.executable, "-c", WITHOUT_TORCH, "plan", "model=deepseek_r1_671b", "strategy=fsdp", "trainer.num_nodes=32", "trainer.devices=8", "data.global_batch_size=8"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # of the processor: other tests run beside this one
    assert "train refuses" in done.stdout, "8 samples have no 256 shares"
    assert "all gather, a step" in done.stdout


def test_a_run_that_does_not_fit_is_refused_with_what_makes_it_fit(capsys):
    assert main(["plan", "model=llama2_7b", *SHARDED, "trainer.devices=8", "plan.memory=24GB"]) == 2
    said = capsys.readouterr().err
    assert "`plan.memory` must be at least" in said
    assert "It fits with" in said


SHARE = ("data.global_batch_size=8",)  # one sample a process: the paper's batch is accumulated, and its gradients alone take 27 GB
LESS_THAN_ITS_SHARE = ("trainer.num_nodes=16", "data.global_batch_size=512", "data.micro_batch_size=1")  # gradients of all parameters wait


@pytest.mark.parametrize(("model", "more"), [("llama2_7b", SHARE), ("llama2_70b", LESS_THAN_ITS_SHARE)])
def test_what_is_advised_does_fit(model, more):
    given = (f"model={model}", *SHARDED, *more, "trainer.devices=8", "plan.memory=60GB" if more is not SHARE else "plan.memory=30GB")
    with pytest.raises(ConfigError) as refused:
        plan(*given)
    words = str(refused.value).partition("It fits with ")[2].rstrip(".").split()
    figures = plan(*given, *words)
    assert words
    assert figures.memory <= (60e9 if more is not SHARE else 30e9)
    assert figures.largest_micro_batch_size >= figures.micro_batch_size


def test_the_largest_micro_batch_is_the_largest_divisor_that_fits():
    overrides = ("model=llama2", "trainer.accelerator=cpu", "data.global_batch_size=64")
    figures = plan(*overrides, "plan.memory=400MB", "data.micro_batch_size=1")
    largest = figures.largest_micro_batch_size
    assert plan(*overrides, f"data.micro_batch_size={largest}").memory <= 400e6 < plan(*overrides, f"data.micro_batch_size={2 * largest}").memory


def test_shards_divide_what_is_held_between_steps():
    one, eight = (plan("model=llama2_7b", *SHARDED, f"trainer.devices={n}", f"data.global_batch_size={n}") for n in (1, 8))
    held = [sum(f.memory_by_part[name] for name in ("parameters", "optimizer")) for f in (one, eight)]
    assert held[0] == pytest.approx(12 * one.n_params, rel=1e-6), "and a counter of the steps for each tensor"
    assert held[1] == pytest.approx(held[0] / 8, rel=1e-3)


def test_devices_follow_the_trainer_and_a_contradiction_is_refused():
    assert plan("model=llama2", "trainer.devices=4", "trainer.num_nodes=2").n_devices == 8
    with pytest.raises(ConfigError, match=r"`plan\.n_devices` must be null or 8"):
        plan("model=llama2", "trainer.devices=4", "trainer.num_nodes=2", "plan.n_devices=4")


def test_a_simulation_stands_beside_what_was_counted():
    figures = plan("model=llama2", "trainer.accelerator=cpu", "model.n_layers=1", "data.global_batch_size=2", "plan.simulate=true")
    assert figures.memory == pytest.approx(figures.memory_simulated, rel=0.02)


@pytest.mark.parametrize("value", ["lots", "80GX", "0GB"])
def test_a_size_without_a_unit_is_refused(value):
    with pytest.raises(ConfigError, match=r"`plan\.memory` must be a size such as 80GB"):
        plan("model=llama2", f"plan.memory={value}")


def test_whole_logits_of_sampled_completions_are_not_counted():
    """A temperature alone is within the chunks of the loss."""
    asked = "model=llama2", "data=arithmetic", "objective=grpo"
    assert plan(*asked, "objective.temperature=0.7").memory == plan(*asked).memory
    for whole in ("objective.top_p=0.9", "objective.use_cache=false data.micro_batch_size=1"):
        figures = plan(*asked, *whole.split())
        assert figures.memory is None
        assert figures.memory_missing == f"{whole.split()[0]}: the loss holds whole logits"


def test_a_users_part_that_does_not_say_what_it_computes_is_not_counted(forget):
    import dataclasses as dc

    from txtrain.registry import register

    register("attention", "mean", "nowhere:Mean", _Mean)
    config = txtrain.compose(["model=llama2"])
    figures = txtrain.plan(dc.replace(config, model=dc.replace(config.model, attention=_Mean(type="mean"))))
    assert figures.memory is None
    assert "mean does not say what it computes" in figures.memory_missing


def _mean() -> type:
    from txtrain.model.options import AttentionBase

    class Mean(AttentionBase):
        def n_params(self, model, layer=0):
            return 0

    return Mean


_Mean = _mean()

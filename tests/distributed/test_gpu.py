"""What needs GPUs: `pytest -m gpu` one of them, `pytest -m multigpu` two, which speak by NCCL. Attention's kernels and compiled blocks have
theirs beside those of the processor: tests/unit/model/test_attention.py, tests/unit/parallel/test_activation_checkpointing.py."""

import pytest

import txtrain
from tests.device import accelerator
from tests.distributed.equivalence import KINDS, WAYS, Runs
from tests.distributed.group import Case, train
from tests.distributed.runs import overrides, tensors
from tests.training import rows

HALF = "trainer.precision=bf16-mixed"
EXACT = ("model.dropout=0.1", "trainer.deterministic=true", "data.micro_batch_size=2")


def on_gpu(folder, name, *more):
    return [*(o for o in overrides(folder, "decoder", name, *more) if not o.startswith("trainer.accelerator=")), accelerator("cuda")]


def assert_same(a, b):
    assert rows(a) == rows(b)
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    assert not [name for name in one if not one[name].equal(other[name])]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["trainer.precision=32-true", HALF])
def test_a_run_on_a_gpu_continues_bit_for_bit(tmp_path, precision):
    txtrain.train(txtrain.compose(on_gpu(tmp_path, "whole", *EXACT, precision)))
    for steps in (6, 10):
        txtrain.train(txtrain.compose(on_gpu(tmp_path, "parts", *EXACT, precision, f"trainer.max_steps={steps}")))
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_ways_of_one_process_are_equal_on_a_gpu(tmp_path, kind):
    """Flex attention beside the formula, among others."""
    Runs(tmp_path, "cuda").compare([(way, kind) for way in WAYS if WAYS[way].n == 1 and kind in WAYS[way].kinds])


@pytest.mark.multigpu
@pytest.mark.parametrize("kind", KINDS)
def test_two_gpus_equal_one(tmp_path, kind):
    Runs(tmp_path, "cuda").compare([(way, kind) for way in WAYS if WAYS[way].n == 2 and kind in WAYS[way].kinds])


@pytest.mark.multigpu
def test_runs_on_two_gpus_continue_bit_for_bit(tmp_path):
    def cases(name, steps):
        ways = ("ddp", "fsdp", "tp", "deepspeed_stage_3")
        run = ("trainer.devices=2", f"trainer.max_steps={steps}", *EXACT)
        return {way: Case(on_gpu(tmp_path, f"{way}-{name}", f"strategy={way}", *run)) for way in ways}

    for name, steps in (("whole", 10), ("parts", 6), ("parts", 10)):
        train(cases(name, steps), 2, tmp_path / f"{name} {steps}", timeout=600, device="cuda")
    for way in cases("", 0):
        assert_same(tmp_path / f"{way}-whole", tmp_path / f"{way}-parts")

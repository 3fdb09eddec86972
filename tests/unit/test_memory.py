"""Memory as it is counted equals memory as torch's tracker sees it on the real wrapped model."""

import json
import os
import subprocess
import sys

import pytest

import txtrain
from txtrain.config import Train
from txtrain.memory.count import memory
from txtrain.memory.simulate import measure, simulate
from txtrain.memory.tape import Tape
from txtrain.parallel.base import OneProcess

FAMILIES = ("transformer", "gpt1", "bert", "gpt2", "t5", "vit", "llama2", "mistral", "gemma", "gemma2", "deepseek_r1")
SHARDED = ("strategy=fsdp", "trainer.precision=bf16-mixed", "trainer.activation_checkpointing=full")
MORE = [
    (1, ("trainer.activation_checkpointing=selective", "data.micro_batch_size=2")),
    (2, ("strategy=fsdp", "data.micro_batch_size=1")),
    (1, ("trainer.precision=bf16-mixed",)),
    (4, ("strategy=hsdp", "trainer.activation_checkpointing=2")),
    (1, ("trainer.precision=bf16-true",)),
    (4, ("strategy=ddp",)),
]


def composed(family: str, *overrides: str) -> Train:
    layers = "model.n_layers=2"  # the first and the last
    return txtrain.compose([f"model={family}", "trainer.accelerator=cpu", layers, "data.global_batch_size=4", *overrides])


def agree(config: Train, world: int, allowed: float = 0.02) -> None:
    counted, seen = memory(config, world), simulate(config, world=world)
    assert abs(counted.peak / seen.peak - 1) < allowed, f"counted {counted.peak:,} {counted.parts}, simulated {seen.peak:,} {seen.parts}"
    assert abs(counted.held / seen.held - 1) < 0.001, (counted.held, seen.held)
    for name in ("all_gather", "reduce_scatter"):
        assert counted.communicated.get(name, 0) == seen.communicated.get(name, 0), name


@pytest.mark.parametrize("family", FAMILIES)
def test_counted_equals_simulated_on_one_process(family):
    agree(composed(family), 1)


@pytest.mark.parametrize("family", ["llama2", "t5", "deepseek_r1"])
def test_counted_equals_simulated_in_shards(family):
    agree(composed(family, *SHARDED), 4)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "overrides"), [(4, SHARDED), *MORE])
@pytest.mark.parametrize("family", FAMILIES)
def test_counted_equals_simulated_under_every_strategy(family, world, overrides):
    agree(composed(family, *overrides), world)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama2_7b", "gemma2_2b", "mistral_7b", "t5_base", "bert_large", "vit_h14"])
def test_counted_equals_simulated_at_a_published_size(name):
    agree(txtrain.compose([f"model={name}", "trainer.accelerator=cpu", *SHARDED, "data.global_batch_size=8"]), 8)


@pytest.mark.parametrize("family", ["llama2", "gpt2"])
def test_counted_equals_measured_on_real_tensors(family):
    config = composed(family, "data.seq_len=64")
    counted, seen = memory(config, 1), measure(config, OneProcess(config))
    assert abs(counted.peak / seen.peak - 1) < 0.03, f"counted {counted.peak:,}, measured {seen.peak:,}"


TWO = """
import json, sys, txtrain
from txtrain.memory.simulate import measure
from txtrain.parallel.build import make_parallel
config = txtrain.compose(sys.argv[1:])
parallel = make_parallel(config)
with parallel.started():
    print(json.dumps(measure(config, parallel).peak))
"""


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("trainer.activation_checkpointing=full",), ("trainer.precision=bf16-mixed",)])
def test_counted_equals_measured_in_two_processes_with_shards(tmp_path, overrides):
    words = ["model=llama2", "trainer.accelerator=cpu", "model.n_layers=2", "data.global_batch_size=4", "strategy=fsdp", "trainer.devices=2", *overrides]
    here = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TXTRAIN_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", TWO, *words], env=here | {"RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE, text=True) for rank in "01"
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    counted = memory(txtrain.compose(words), 2)
    for peak in map(json.loads, said):
        assert abs(counted.peak / peak - 1) < 0.03, f"counted {counted.peak:,}, measured {peak:,}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tape_meets_every_parameter_once(family):
    config = composed(family)
    assert memory(config, 1).parts["parameters"] == 4 * config.model.n_params


def test_a_tape_gives_everything_back():
    t = Tape()
    x = t.linear(t.linear(t.constant(60), 10, 20), 20, 5)
    assert t.meter.now == 4 * (60 + 120 + 30)
    t.backward(x)
    gradients = 4 * (200 + 100)
    del x
    assert t.meter.now == gradients
    assert t.meter.peak == 4 * (60 + 100 + 120 + 200), "the input, the second product's gradient, the first's, and what it makes of it"


def test_counting_needs_no_torch():
    program = "import sys; from txtrain.memory import count, fit; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_gradients_of_earlier_micro_batches_lie_whole_in_every_process():
    """Under FSDP they are not reduced before the last: accumulation costs a copy of all gradients."""
    config = composed("llama2", "strategy=fsdp", "data.micro_batch_size=1")
    alone, several = memory(config, 4), memory(config, 2)
    assert several.peak - alone.peak > 3 * config.model.n_params

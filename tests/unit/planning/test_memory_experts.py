"""What plan says where experts lie over processes."""

import math

import pytest

import txtrain
from tests.unit.planning.test_memory import SHARDED, TWO, agree, composed, in_two_processes
from txtrain.planning.memory.count import memory
from txtrain.planning.memory.fsdp import Shards

DIVIDED = ("strategy=fsdp", "strategy.ep_size=2", "trainer.devices=4")


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_products_of_experts_that_selective_checkpointing_keeps_are_counted(precision):
    """Each of 256 tokens has 4 rows of 1,024 numbers in two products, and of 64 in the third."""
    sizes = "model.dim=64", "model.vocab_size=300", "model.ffn.hidden_dim=1024", "model.ffn.n_experts=4", "model.ffn.top_k=4"
    given = *sizes, f"trainer.precision={precision}", "data.seq_len=256", "data.global_batch_size=1"
    config, full = (composed("deepseek_r1", *given, f"trainer.activation_checkpointing={how}") for how in ("selective", "full"))
    agree(config, 1)
    kept = 256 * 4 * (2 * 1024 + 64) * (4 if precision == "32-true" else 2)
    assert memory(config, 1).peak - memory(full, 1).peak > kept


@pytest.mark.slow
def test_counted_equals_simulated_where_shards_cut_within_experts():
    """4 shards do not divide 6 experts: nothing is padded, and everything is copied once more."""
    agree(composed("deepseek_r1", *SHARDED, "model.ffn.n_experts=6", "model.n_layers=3"), 4)


def test_shards_beyond_the_number_of_experts_are_not_padded():
    config = txtrain.compose(["model=deepseek_r1_671b", "trainer.precision=bf16-mixed", "strategy=fsdp", "data.global_batch_size=1024"], verb="plan")
    of_experts = 0
    gathered = {}
    for world in (256, 1024):
        shards = Shards(config, config.strategy.layout(world))
        stacked = [p for p in shards.pieces if ".experts." in p.name]
        assert all(math.prod(shards.own(p)) * world == p.n for p in stacked)
        of_experts = sum(p.n for p in stacked)
        gathered[world] = memory(config, world).communicated["all_gather"]
    assert of_experts > 0.95 * config.model.n_params
    # What grows are matrices of fewer rows than shards: routers (256), keys' rotated part (64), latents (512; 1536 up to 2048). All experts
    # filled up from 256 to 1024 would be four times as much.
    filled = {1024: 0, 256: 0}
    for world in filled:
        for p in (p for p in shards.pieces if ".experts." not in p.name):
            filled[world] += (-p.shape[0] % world) * math.prod(p.shape[1:]) * (2 if ".attention" in p.name or ".ffn" in p.name else 1)
    assert gathered[1024] - gathered[256] == 2 * (filled[1024] - filled[256]), "bfloat16, blocks once more in the backward"
    assert 1 <= gathered[1024] / gathered[256] < 1.002


def test_bytes_that_travel_to_experts_are_told():
    config = composed("deepseek_r1", *DIVIDED, "data.global_batch_size=4")
    model, T = config.model, config.seq_len
    rows = ((model.n_layers - model.ffn.dense_layers) * T + model.mtp_depth * (T - 1)) * model.ffn.top_k
    sent = memory(config, 4).communicated
    assert sent["all_to_all"] == 4 * rows * model.dim * 4, "to the experts and back, forward and backward, float32"
    assert txtrain.plan(config).communicated == sent


DIVISIONS = [
    (4, ("strategy=fsdp", "strategy.ep_size=2")),
    (2, ("strategy=fsdp", "strategy.ep_size=2", "trainer.precision=bf16-mixed", "trainer.activation_checkpointing=full")),
    (4, ("strategy=fsdp", "strategy.ep_size=4", "data.seq_len=64", "data.global_batch_size=8", "data.micro_batch_size=1")),
    (4, ("strategy=fsdp", "strategy.ep_size=2", "trainer.activation_checkpointing=full")),
    (4, (*SHARDED, "strategy.ep_size=2", "model.n_layers=4")),
    (4, ("strategy=fsdp", "strategy.ep_size=2", "strategy.reshard_after_forward=false")),
    (8, ("strategy=hsdp", "strategy.ep_size=2", "trainer.activation_checkpointing=selective", "data.global_batch_size=8")),
]


@pytest.mark.parametrize(("world", "overrides"), [DIVISIONS[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in DIVISIONS[1:])])
def test_counted_equals_simulated_where_experts_are_divided(world, overrides):
    config = composed("deepseek_r1", *overrides)
    agree(config, world)


# Of a batch of one token over and over, all rows would go to two experts.
SPREAD = """
import torch
from txtrain.training import simulate
zeros_of = simulate.tensors_of
def tensors_of(config, n):
    torch.manual_seed(0)
    return {name: torch.randint(0, config.model.vocab_size, value.shape) for name, value in zeros_of(config, n).items()}
simulate.tensors_of = tensors_of
"""


@pytest.mark.slow
def test_counted_equals_measured_where_two_processes_divide_experts(tmp_path):
    """Where a router sends rows is its own: about as many come as go."""
    cases = [
        f"model=deepseek_r1 trainer.accelerator=cpu model.n_layers=2 data.global_batch_size=4 trainer.devices=2 strategy=fsdp strategy.ep_size=2 {more}"
        for more in ("", "trainer.activation_checkpointing=full", "trainer.precision=bf16-mixed")
    ]
    counted = [memory(txtrain.compose(words.split()), 2).peak for words in cases]
    for output in in_two_processes(tmp_path, "-c", SPREAD + TWO, *cases):
        off = [n / int(peak) - 1 for n, peak in zip(counted, output.split(), strict=True)]
        assert all(abs(deviation) < 0.03 for deviation in off), off

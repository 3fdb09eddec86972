"""What plan says where experts lie over processes."""

import pytest

import txtrain
from tests.unit.test_memory import SHARDED, agree, composed
from txtrain.errors import ConfigError
from txtrain.memory.count import NotCounted, memory

DIVIDED = ("strategy=fsdp", "strategy.ep_size=2", "trainer.devices=4")


def test_counted_equals_simulated_where_shards_cut_within_experts():
    """4 shards do not divide 6 experts: nothing is padded, and everything is copied once more."""
    agree(composed("deepseek_r1", *SHARDED, "model.ffn.n_experts=6", "model.n_layers=3"), 4)


def test_shards_beyond_the_number_of_experts_are_not_padded():
    config = txtrain.compose(["model=deepseek_r1_671b", "trainer.precision=bf16-mixed", "strategy=fsdp", "data.global_batch_size=1024"], verb="plan")
    gathered = [memory(config, world).communicated["all_gather"] for world in (256, 1024)]
    assert 1 <= gathered[1] / gathered[0] < 1.001


def test_bytes_that_travel_to_experts_are_told_where_memory_is_not():
    config = composed("deepseek_r1", *DIVIDED, "data.global_batch_size=4")
    with pytest.raises(NotCounted, match=r"strategy.ep_size=2") as raised:
        memory(config, 4)
    model, T = config.model, config.seq_len
    rows = ((model.n_layers - model.ffn.dense_layers) * T + model.mtp_depth * (T - 1)) * model.ffn.top_k
    assert raised.value.communicated == {"all_to_all": 4 * rows * model.dim * 4}, "to the experts and back, forward and backward, float32"
    plan = txtrain.plan(config)
    assert (plan.memory, plan.communicated) == (None, raised.value.communicated)


def test_what_the_router_alone_knows_is_not_simulated():
    config = txtrain.compose(["model=deepseek_r1", *DIVIDED, "plan.simulate=true"], verb="plan")
    with pytest.raises(ConfigError, match=r"`plan.simulate` must be false with strategy.ep_size=2"):
        txtrain.plan(config)

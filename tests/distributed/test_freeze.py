"""A model of which a part is frozen, on several ranks: the losses, norms and weights of one process, and what is frozen to the bit."""

import pytest

import txtrain
from tests.distributed.group import Case, train
from tests.distributed.runs import largest_differences, overrides, tensors

ALLOWED = 1e-5  # relative, float32: the order of summation
BY_TWO = "data.micro_batch_size=2"
ALL = {
    "ddp, accumulation": ("strategy=ddp", BY_TWO),
    "fsdp, accumulation": ("strategy=fsdp", BY_TWO),
    "fsdp, checkpointing": ("strategy=fsdp", "trainer.activation_checkpointing=full"),
    "fsdp, offload": ("strategy=fsdp", "strategy.cpu_offload=true"),
    "tp, checkpointing": ("strategy=tp", "trainer.activation_checkpointing=full"),
    "stage 1": ("strategy=deepspeed_stage_1",),
    "stage 2": ("strategy=deepspeed_stage_2", BY_TWO),
    "stage 3": ("strategy=deepspeed_stage_3", BY_TWO),
    "stage 3, checkpointing": ("strategy=deepspeed_stage_3", "trainer.activation_checkpointing=full"),
}
EXPERTS = {"fsdp": ("strategy=fsdp",), "ep": ("strategy=fsdp", "strategy.ep_size=2")}
COMMON = ("optimizer=adamw", "optimizer.lr=0.01", "save.every_n_steps=10")


def compare(folder, model, freeze, ways, n=2):
    common = (*COMMON, f"freeze={freeze}")
    alone = txtrain.train(txtrain.compose(overrides(folder, model, "reference", *common))).run_dir
    train({way: Case(overrides(folder, model, way, *common, f"trainer.devices={n}", *how)) for way, how in ways.items()}, n, folder / "group", 600)
    whole = tensors(alone)
    kept = [name for name in whole if name.startswith("model.") and f"optimizer.{name.removeprefix('model.')}.step" not in whole]
    assert kept
    for way in ways:
        for column, difference in largest_differences(alone, folder / way).items():
            assert difference < ALLOWED, f"{way}: {column} {difference:.1e}, allowed {ALLOWED:.0e}"
        here = tensors(folder / way)
        assert here.keys() == whole.keys(), way
        assert all(here[name].equal(whole[name]) for name in kept), way


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "freeze"),
    [
        ("decoder", "[embedding,blocks.0]"),
        ("decoder", "[ffn,head]"),
        ("decoder", "[blocks]"),
        ("two stacks", "[encoder,embedding]"),
        ("encoder", "[attention]"),
    ],
)
def test_every_strategy_that_freezes_equals_one_process(tmp_path, model, freeze):
    compare(tmp_path, model, freeze, ALL)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["[embedding,blocks.1.ffn.experts]", "[embedding,blocks.0]"])
def test_experts_that_are_divided_and_frozen_equal_one_process(tmp_path, freeze):
    compare(tmp_path, "experts", freeze, EXPERTS)

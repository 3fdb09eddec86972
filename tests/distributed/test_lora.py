"""An adapter on several ranks: the losses, norms and weights of one process, under every strategy; and resumed under another."""

import pytest

import txtrain
from tests.distributed.group import Case, train
from tests.distributed.runs import largest_differences, overrides, tensors
from tests.training import write_labels
from txtrain.model.adapter import factor_of

ALLOWED = 1e-5  # relative, float32: the order of summation
BY_TWO = "data.micro_batch_size=2"
ALL = {
    "ddp": ("strategy=ddp",),
    "fsdp, checkpointing, accumulation": ("strategy=fsdp", "trainer.activation_checkpointing=full", BY_TWO),
    "fsdp, offload": ("strategy=fsdp", "strategy.cpu_offload=true"),
    "tp, checkpointing": ("strategy=tp", "trainer.activation_checkpointing=full"),
    "stage 1": ("strategy=deepspeed_stage_1",),
    "stage 2": ("strategy=deepspeed_stage_2", BY_TWO),
    "stage 3": ("strategy=deepspeed_stage_3", BY_TWO),
}
EXPERTS = {"fsdp": ("strategy=fsdp",), "ep": ("strategy=fsdp", "strategy.ep_size=2"), "tp": ("strategy=tp",), "stage 3": ("strategy=deepspeed_stage_3",)}
COMMON = ("optimizer=adamw", "optimizer.lr=0.01", "save.every_n_steps=10")


def compare(folder, model, targets, ways, n=2, first=10, more=(), whole=()):
    """first: the steps that the ranks make; one process makes the rest. whole: what lies in a checkpoint beside the adapter."""
    base = txtrain.train(txtrain.compose(overrides(folder, model, "base", *COMMON, "trainer.max_steps=2"))).run_dir
    common = (*COMMON, "adapter=lora", "adapter.r=4", f"adapter.target_modules={targets}", f"init_from={base}", *more)

    def given(name, *further):
        return [*{given.split("=")[0]: given for given in overrides(folder, model, name, *common, *further)}.values()]

    alone = txtrain.train(txtrain.compose(given("reference"))).run_dir
    shared = (f"trainer.devices={n}", f"trainer.max_steps={first}")
    train({way: Case(given(way, *shared, *how)) for way, how in ways.items()}, n, folder / "group", 600)
    there = tensors(alone)
    assert {name.partition(".")[0] for name in there} == {"model", "optimizer"}
    assert {name[6:] for name in there if name.startswith("model.") and not factor_of(name[6:])} == set(whole)
    for way in ways:
        if first < 10:
            txtrain.train(txtrain.compose(given(way)))
        for column, difference in largest_differences(alone, folder / way).items():
            assert difference < ALLOWED, f"{way}: {column} {difference:.1e}, allowed {ALLOWED:.0e}"
        here = tensors(folder / way)
        assert here.keys() == there.keys(), way


@pytest.mark.slow
@pytest.mark.parametrize("model", ["decoder", "tied decoder with softcaps and windows", "two stacks", "encoder"])
def test_every_strategy_with_an_adapter_equals_one_process(tmp_path, model):
    compare(tmp_path, model, "all-linear", ALL)


LABELS = {
    "decoder": ("[final_norm,embed_tokens]", ["final_norm.weight", "embedding.token.weight", "head.classifier.weight"]),
    "encoder": ("[]", ["head.classifier.bias", "head.classifier.weight", "head.pooler.bias", "head.pooler.weight"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "first"), [("decoder", 10), ("encoder", 6)])
def test_a_new_head_saved_whole_equals_one_process(tmp_path, model, first):
    modules, whole = LABELS[model]
    labels = ("data=labels", f"data.path={write_labels(tmp_path / 'labels.csv')}", "data.seq_len=32", f"adapter.modules_to_save={modules}")
    compare(tmp_path, model, "all-linear", ALL, first=first, more=labels, whole=whole)


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["all-linear", "[experts.gate_proj,experts.down_proj]"])
def test_adapted_experts_equal_one_process(tmp_path, targets):
    compare(tmp_path, "experts", targets, EXPERTS)


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_alone_as_if_it_had_never_stopped(tmp_path):
    compare(tmp_path, "decoder", "[q_proj,down_proj]", ALL, first=6)

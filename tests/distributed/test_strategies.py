"""One process is the reference: every strategy gives the same losses, validation and gradient norms."""

import pytest

import txtrain
from tests.distributed.group import Case, train
from tests.distributed.runs import MODELS, largest_differences, overrides

ALLOWED = 1e-5  # relative, float32: the order of summation
HOW = {
    "ddp": (),
    "ddp, accumulation": ("strategy=ddp", "data.micro_batch_size=2"),
    "fsdp": ("strategy=fsdp",),
    "fsdp, accumulation": ("strategy=fsdp", "data.micro_batch_size=1"),
    "fsdp, each micro-batch reduced": ("strategy=fsdp", "strategy.reduce_each_micro_batch=true", "data.micro_batch_size=1"),
    "fsdp, gathered parameters kept": ("strategy=fsdp", "strategy.reshard_after_forward=false"),
    "fsdp, checkpointing": ("strategy=fsdp", "trainer.activation_checkpointing=full"),
    "fsdp, offload": ("strategy=fsdp", "strategy.cpu_offload=true"),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """reference(model) is the folder of its run in one process, and where others go."""
    folder = tmp_path_factory.mktemp("strategies")
    made = {}

    def of(model):
        if model not in made:
            made[model] = txtrain.train(txtrain.compose(overrides(folder / model, model, "reference"))).run_dir
        return made[model]

    return of


def compare(reference, models, how, n):
    runs = {(model, way): (reference(model).parent / f"{way}, {n}") for model in models for way in how}
    cases = {f"{m}: {way}": Case(overrides(reference(m).parent, m, runs[m, way].name, f"trainer.devices={n}", *how[way])) for m, way in runs}
    train(cases, n, next(iter(runs.values())).parent.parent / f"group of {n}")
    for (model, way), run in runs.items():
        for name, difference in largest_differences(reference(model), run).items():
            assert difference < ALLOWED, f"{model}, {way}, {n} processes: {name} {difference:.1e}, allowed {ALLOWED:.0e}"


HYBRID = {"hsdp": ("strategy=hsdp", "data.micro_batch_size=1")}
HYBRID["hsdp, each micro-batch reduced"] = (*HYBRID["hsdp"], "strategy.reduce_each_micro_batch=true")
COVERING = ("ddp, accumulation", "fsdp, accumulation", "fsdp, each micro-batch reduced", "fsdp, offload")


@pytest.mark.parametrize("ways", [COVERING, pytest.param([way for way in HOW if way not in COVERING], marks=pytest.mark.slow)])
def test_two_processes_equal_one(reference, ways):
    compare(reference, ["decoder"], {way: HOW[way] for way in ways}, 2)


@pytest.mark.slow
def test_every_kind_of_model_in_two_processes_equals_one(reference):
    compare(reference, [m for m in MODELS if m != "decoder"], {way: HOW[way] for way in ("ddp, accumulation", "fsdp")}, 2)


@pytest.mark.slow
def test_three_and_four_processes_equal_one(reference):
    compare(reference, ["decoder"], HYBRID | {"fsdp": ("strategy=fsdp",)}, 4)

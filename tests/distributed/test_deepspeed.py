"""ZeRO: the losses of one process, and checkpoints that any strategy and number of processes reads."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from tests.device import accelerator
from tests.distributed.zero_cases import launch
from tests.training import TINY, rows, write_text
from txtrain import ConfigError, compose, train
from txtrain.checkpoint.format import locate, read_state
from txtrain.monitor.metrics_csv import read
from txtrain.parallel.config import ZeRO2Config

pytestmark = pytest.mark.skipif("sys.platform != 'linux'", reason="deepspeed")

STEPS, HALF = 10, 6  # the last step, and one with a checkpoint
TOLERANCE = 1e-5  # relative, in float32
REPLACED = ("data.global_batch_size", "save.every_n_steps", "trainer.accelerator", "trainer.max_steps", "trainer.val_check_interval")
HERE = (
    *(o for o in TINY if o.split("=")[0] not in REPLACED),
    accelerator(),
    "trainer.val_check_interval=3",
    "scheduler=constant",
    "model.max_seq_len=16",
    "data.global_batch_size=6",
    "save.every_n_steps=3",
    "save.keep_last=9",
    "trainer.gradient_clip_val=0.5",
)
STAGES = ("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


class Runs:
    """Runs in one folder, on one text."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.common = [*HERE, f"data.path={write_text(folder / 'text.txt')}", f"data.cache_dir={folder / 'cache'}"]

    def case(self, name: str, *overrides: str, steps: int = STEPS, copy: str | None = None) -> list[str]:
        """Overrides of a run, from scratch or (copy) from the newest checkpoint of another."""
        copied = [f"copy={self.folder / copy}"] if copy else []
        given = {o.split("=")[0] for o in overrides}
        common = (o for o in self.common if o.split("=")[0] not in given)
        return [*common, f"run_dir={self.folder / name}", f"trainer.max_steps={steps}", *copied, *overrides]

    def alone(self, name: str, *overrides: str, steps: int = STEPS, copy: str | None = None) -> None:
        if copy:
            shutil.copytree(self.folder / copy, self.folder / name)
        train(compose(self.case(name, *overrides, steps=steps)))

    def together(self, n: int, cases: dict[str, list[str]]) -> None:
        launch(n, cases, self.folder, seconds=120 + 60 * len(cases))

    def difference(self, name: str, reference: str, columns: tuple[str, ...] = ("loss", "val_loss", "grad_norm")) -> float:
        """The largest, relative, over all steps."""
        found, wanted = (read(self.folder / run / "metrics.csv") for run in (name, reference))
        assert [row["step"] for row in found] == [row["step"] for row in wanted] == [str(i + 1) for i in range(STEPS)], name
        pairs = [(float(a[c]), float(b[c])) for a, b in zip(found, wanted, strict=True) for c in columns if b[c]]
        return max(abs(a - b) / abs(b) for a, b in pairs)

    def tensors(self, name: str) -> dict[str, bytes]:
        """What each process wrote into the newest checkpoint."""
        files = sorted(locate(self.folder / name).glob("*.safetensors"))
        return {f"{f.name}/{key}": tensor.numpy().tobytes() for f in files for key, tensor in load_file(f).items()}

    def assert_same(self, name: str, reference: str) -> None:
        assert rows(self.folder / name) == rows(self.folder / reference), name
        assert self.tensors(name) == self.tensors(reference), name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("zero"))
    made.alone("one")
    assert "deepspeed" not in sys.modules  # seconds that only its own runs may cost
    return made


@pytest.fixture(scope="module")
def two(runs):
    """Stages 2 and 3 on two processes, with accumulation; stopped and continued."""
    accumulated = "data.micro_batch_size=1"
    cases = {stage: runs.case(stage, f"strategy={stage}", accumulated) for stage in STAGES[1:]}
    cases["half"] = runs.case("half", "strategy=deepspeed_stage_3", accumulated, steps=HALF)
    cases["continued"] = runs.case("continued", "strategy=deepspeed_stage_3", accumulated, copy="half")
    runs.together(2, cases)
    return runs


@pytest.mark.parametrize("stage", STAGES[1:])
def test_losses_and_norms_are_those_of_one_process(two, stage):
    assert two.difference(stage, "one") < TOLERANCE


def test_gradients_are_clipped_in_these_runs(two):
    assert all(float(row["grad_norm"]) > 0.5 for row in read(two.folder / "one" / "metrics.csv"))


def test_a_continued_run_is_the_uninterrupted_one_bit_for_bit(two):
    two.assert_same("continued", "deepspeed_stage_3")


def test_a_checkpoint_of_stage_3_is_continued_by_one_process(two):
    two.alone("half-one", copy="half")
    assert two.difference("half-one", "one") < TOLERANCE


def test_what_zero_cannot_do_is_refused_where_it_is_composed():
    with pytest.raises(ConfigError, match=r"`trainer.precision` must be 32-true or bf16-mixed with strategy=deepspeed_stage_2, but is bf16-true"):
        compose([*HERE, "strategy=deepspeed_stage_2", "trainer.precision=bf16-true", "data.path=text.txt"])
    muon, trainer = SimpleNamespace(type="muon", elementwise=False), SimpleNamespace(precision="32-true")
    whole_matrices = SimpleNamespace(ema=SimpleNamespace(decay=None), optimizer=muon, trainer=trainer, layer_stats=SimpleNamespace(every_n_steps=None))
    (problem,) = ZeRO2Config(type="deepspeed_stage_2").check_with(whole_matrices)
    assert problem.startswith("`optimizer` must be one of adamw, adam")


# ------------------------------------------------------------------------------------------------------------------------- slow


@pytest.fixture(scope="module")
def further(runs):
    """Stage 1; a run that one process began; and one run in three parts."""
    runs.alone("one-half", steps=HALF)
    cases = {STAGES[0]: runs.case(STAGES[0], f"strategy={STAGES[0]}", "data.micro_batch_size=1")}
    cases["one-3"] = runs.case("one-3", "strategy=deepspeed_stage_3", copy="one-half")
    runs.alone("first-part", steps=3)
    cases["second-part"] = runs.case("second-part", "strategy=fsdp", copy="first-part", steps=HALF)
    cases["third-part"] = runs.case("third-part", "strategy=deepspeed_stage_2", copy="second-part")
    runs.together(2, cases)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("run", [STAGES[0], "one-3", "third-part"])
def test_stage_1_and_runs_that_others_began_equal_one_process(further, run):
    assert further.difference(run, "one") < TOLERANCE
    hashes = {read_state(locate(further.folder / one)).data_order_hash for one in ("one", run)}
    assert len(hashes) == 1, "other samples, or in another order"


# By name: strategy and number of processes. 3 divides the size of hardly any parameter.
SOURCES = {"one": ("auto", 1), "ddp": ("ddp", 2), "fsdp": ("fsdp", 2)} | {"z1": (STAGES[0], 2), "z2": (STAGES[1], 3), "z3": (STAGES[2], 3)}
TARGETS = {name: SOURCES[name] for name in ("one", "ddp", "fsdp")} | {f"z{i}x{n}": (STAGES[i - 1], n) for i in (1, 2, 3) for n in (1, 2, 3)}
PAIRS = [(a, b) for a in SOURCES for b in TARGETS if a[0] == "z" or b[0] == "z"]


@pytest.fixture(scope="module")
def matrix(runs):
    """Every source to the half, every target from there."""
    for n in (1, 2, 3):
        halves = {name: strategy for name, (strategy, size) in SOURCES.items() if size == n}
        runs.together(n, {f"from-{name}": runs.case(f"from-{name}", f"strategy={strategy}", steps=HALF) for name, strategy in halves.items()})
    for n in (1, 2, 3):
        pairs = [(a, b, TARGETS[b][0]) for a, b in PAIRS if TARGETS[b][1] == n]
        cases = {f"{a}-{b}": runs.case(f"{a}-{b}", f"strategy={strategy}", copy=f"from-{a}") for a, b, strategy in pairs}
        whole = {name: strategy for name, (strategy, size) in SOURCES.items() if size == n and name[0] == "z"}
        runs.together(n, cases | {f"whole-{name}": runs.case(f"whole-{name}", f"strategy={strategy}") for name, strategy in whole.items()})
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_any_checkpoint_is_continued_by_any_strategy(matrix, source, target):
    assert matrix.difference(f"{source}-{target}", "one") < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [("z1", "z1x2"), ("z2", "z2x3"), ("z3", "z3x3")])
def test_on_as_many_processes_it_is_bit_for_bit_the_uninterrupted_run(matrix, source, target):
    matrix.assert_same(f"{source}-{target}", f"whole-{source}")


HALF_PRECISION = 2e-3  # relative, of losses after 10 steps: bfloat16 weights beside autocast, which keeps what is no product in float32
WITHOUT_DROPOUT = ("model.dropout=0", "model.vocab_size=360", "optimizer.lr=0.001")
MODELS = {
    "moe": ("model=deepseek_r1", *WITHOUT_DROPOUT),
    "tied": ("model=gemma2", *WITHOUT_DROPOUT),
    "two-stacks": ("model=t5", "optimizer=adamw", "model.output_dropout=0", "model.ffn.dropout=0", "model.attention.dropout=0", *WITHOUT_DROPOUT),
}


@pytest.fixture(scope="module")
def varied(runs):
    """Precisions, offload, recomputation, compilation and other models, on two processes; each beside one process where that differs."""
    half = "trainer.precision=bf16-mixed"
    runs.alone("one-bf16", half)
    for name, model in MODELS.items():
        runs.alone(f"one-{name}", *model)
    cases = {}
    for stage in STAGES:
        cases[f"bf16-{stage}"] = (half, f"strategy={stage}", "data.micro_batch_size=1")
        cases[f"offload-{stage}"] = (f"strategy={stage}", "strategy.cpu_offload=true")
        cases[f"again-{stage}"] = (f"strategy={stage}", "trainer.activation_checkpointing=selective", "optimizer=adamw")
    cases["compiled"] = ("strategy=deepspeed_stage_3", "trainer.compile=true")
    cases |= {f"{name}-{stage}": (f"strategy={stage}", *model) for name, model in MODELS.items() for stage in STAGES[1:]}
    made = {name: runs.case(name, *overrides) for name, overrides in cases.items()}
    for stage in STAGES:
        for what in ("bf16", "offload"):
            made[f"{what}-half-{stage}"] = runs.case(f"{what}-half-{stage}", *cases[f"{what}-{stage}"], steps=HALF)
            made[f"{what}-continued-{stage}"] = runs.case(f"{what}-continued-{stage}", *cases[f"{what}-{stage}"], copy=f"{what}-half-{stage}")
    runs.together(2, made)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_is_near_that_of_one_process(varied, stage):
    assert varied.difference(f"bf16-{stage}", "one-bf16", ("loss", "val_loss")) < HALF_PRECISION


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("what", ["bf16", "offload"])
def test_these_are_continued_bit_for_bit(varied, what, stage):
    varied.assert_same(f"{what}-continued-{stage}", f"{what}-{stage}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"{what}-{stage}" for what in ("offload", "again") for stage in STAGES), "compiled"])
def test_where_things_lie_and_what_is_computed_again_changes_no_loss(varied, name):
    assert varied.difference(name, "one") < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("model", MODELS)
def test_other_models_too(varied, model, stage):
    assert varied.difference(f"{model}-{stage}", f"one-{model}") < TOLERANCE

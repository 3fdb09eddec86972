"""Preferences and distillation on two processes: the run of one, and the same after a stop."""

from __future__ import annotations

from pathlib import Path

import pytest

import txtrain
from tests.distributed.group import Case, train
from tests.distributed.runs import COMMON, largest_differences
from tests.training import rows, weights, write_chats, write_preferences
from txtrain import compose

pytestmark = [pytest.mark.slow, pytest.mark.skipif("sys.platform != 'linux'", reason="gloo, deepspeed")]

SHORT = ("trainer.max_steps=6", "trainer.val_check_interval=3")
MODEL = ("model=gpt2", *COMMON, "model.vocab_size=360", "model.max_seq_len=48", *SHORT)
HOW = {
    "ddp": ("strategy=ddp",),
    "fsdp": ("strategy=fsdp", "data.micro_batch_size=2"),
    "tp": ("strategy=tp",),
    "zero 2": ("strategy=deepspeed_stage_2",),
    "zero 3": ("strategy=deepspeed_stage_3",),
}
DISTILL = ("objective=distill", "objective.temperature=2")
KINDS = {
    "dpo": ("objective=dpo", "objective.sft_weight=0.3"),
    "dpo, cached": ("objective=dpo", "objective.sft_weight=0.3", "objective.reference=cached"),
    "distill": DISTILL,
    "distill, top k": (*DISTILL, "objective.kl=reverse", "objective.top_k=9"),
}
COLUMNS = {"dpo": ("loss", "sft_loss", "val_reward_margin", "val_loss", "grad_norm"), "distill": ("loss", "hard_loss", "val_loss", "grad_norm")}


def overrides(folder: Path, kind: str, name: str, *more: str) -> list[str]:
    of_kind, data = KINDS[kind], write_chats if kind.startswith("distill") else write_preferences
    teacher = [f"objective.teacher={folder / 'teacher'}"] if kind.startswith("distill") else []
    shared = (*data(folder / data.__name__), f"data.cache_dir={folder / 'cache'}", f"run_dir={folder / name}", "seed=3")
    return [*MODEL, *of_kind, *teacher, *shared, *more]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each kind in one process."""
    folder = tmp_path_factory.mktemp("tuning")
    given = (*MODEL, "objective=sft", *write_chats(folder / "write_chats"), f"data.cache_dir={folder / 'cache'}")
    txtrain.train(compose([*given, f"run_dir={folder / 'teacher'}"]))
    for kind in KINDS:
        txtrain.train(compose(overrides(folder, kind, kind)))
    return folder


def test_two_processes_have_the_losses_and_gradients_of_one(alone: Path) -> None:
    pairs = [(kind, how) for kind in KINDS for how in HOW if (kind, how) != ("distill, top k", "tp")]
    runs = {f"{kind}, {how}": overrides(alone, kind, f"{kind}, {how}", "trainer.devices=2", *HOW[how]) for kind, how in pairs}
    train({name: Case(given) for name, given in runs.items()}, 2, alone / "group", timeout=900)
    for kind, how in pairs:
        differences = largest_differences(alone / kind, alone / f"{kind}, {how}", COLUMNS[kind.partition(",")[0]])
        assert max(differences.values()) < 1e-5, (kind, how, differences)


@pytest.mark.parametrize("kind", ["dpo", "dpo, cached", "distill"])
def test_two_processes_stop_and_go_on(alone: Path, kind: str) -> None:
    """As if they had not: every value, bit for bit."""
    saves = ("save.every_n_steps=3", "trainer.devices=2", "strategy=fsdp")
    whole = overrides(alone, kind, f"{kind}, whole", *saves)
    parts = [overrides(alone, kind, f"{kind}, parts", *saves, f"trainer.max_steps={n}") for n in (3, 6)]
    train({"whole": Case(whole), "first": Case(parts[0]), "second": Case(parts[1])}, 2, alone / f"stop {kind}", timeout=300)
    assert rows(alone / f"{kind}, whole") == rows(alone / f"{kind}, parts")
    assert weights(alone / f"{kind}, whole") == weights(alone / f"{kind}, parts")

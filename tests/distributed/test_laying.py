"""Weights that are read after the model is laid over the ranks: the same under every strategy, and no rank holds all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import txtrain
from tests.distributed.group import Case, run, train
from tests.distributed.runs import largest_differences, overrides
from tests.models import seeded, shake
from txtrain import ConfigError, compose
from txtrain.checkpoint.format import locate, shapes
from txtrain.checkpoint.load import open_weights
from txtrain.hf.save import save_pretrained
from txtrain.monitor.metrics_csv import read
from txtrain.parallel.mesh import Mesh
from txtrain.parallel.world import World
from txtrain.registry import TABLE

pytestmark = pytest.mark.skipif("sys.platform != 'linux'", reason="/proc, deepspeed")

SMALL = ("model.n_layers=2", "model.dim=32", "model.n_heads=4", "model.vocab_size=257", "model.max_seq_len=32")
GPT2 = ("model=gpt2", *SMALL)
TEXT = ("data=text", "data.path=text.txt", "data.tokenizer=bytes", "data.seq_len=32")
DATA = (*TEXT, "data.global_batch_size=12", "trainer.accelerator=cpu")
HOW = {
    "ddp": ("strategy=ddp",),
    "fsdp": ("strategy=fsdp",),
    "tp": ("strategy=tp",),
    "experts": ("strategy=fsdp", "strategy.ep_size=2"),
    "fsdp, offload": ("strategy=fsdp", "strategy.cpu_offload=true"),
    **{f"zero {stage}": (f"strategy=deepspeed_stage_{stage}",) for stage in (1, 2, 3)},
    "zero 3, bf16": ("strategy=deepspeed_stage_3", "trainer.precision=bf16-mixed"),
}
# New tokens at the mean of the old ones, interpolated positions, and a layer more that is initialised.
LARGER = ("model.vocab_size=301", "model.max_seq_len=47", "model.n_layers=3", "init_allow_missing=^blocks.2.")
OF_FOUR = {
    "hsdp": ("strategy=hsdp",),
    "fsdp_tp": ("strategy=fsdp_tp",),
    "experts, in shards": ("strategy=fsdp", "strategy.ep_size=2"),
}


def folder(where: Path, *given: str, max_shard_bytes: int = 100_000) -> Path:
    """Of a Hugging Face class, every value another one."""
    config = compose([*given, *DATA])
    where.parent.mkdir(exist_ok=True)
    save_pretrained(shake(seeded(config.model)), where, max_shard_bytes=max_shard_bytes)
    return where


def launch(cases: list[tuple[str, list]], n: int, where: Path, timeout: float = 300) -> str:
    listed = where / f"cases-{n}-{len(list(where.glob('cases-*')))}.json"
    listed.write_text(json.dumps(cases))
    return run([sys.executable, "-m", "tests.distributed.laying_cases", str(listed)], n, where, timeout)


def starts(source: Path, how: tuple[str, ...], model: tuple[str, ...]) -> list[str]:
    return [str(source), *model, *DATA, *how]


def test_two_ranks_read_their_shards(tmp_path):
    """A folder whose tensors are transposed and joined; what two ranks wrote, read by others; a second model."""
    gpt = folder(tmp_path / "gpt2", *GPT2)
    cases = [("is_saved", [starts(gpt, HOW[how], GPT2), str(tmp_path / how)]) for how in ("tp", "fsdp")]
    for source, how in ((gpt, "fsdp"), (tmp_path / "fsdp", "tp")):
        cases.append(("has_the_values_of_one_process", [starts(source, HOW[how], GPT2)]))
    cases += [("tells_where_they_come_from", [starts(source, HOW["fsdp"], GPT2)]) for source in (gpt, tmp_path / "tp")]
    for how in ("fsdp", "tp"):
        cases.append(("has_the_values_of_one_process", [starts(gpt, HOW[how], (*GPT2, *LARGER))]))
    cases += [("reads_a_second_model", [starts(tmp_path / "tp", HOW["fsdp"], GPT2)])]
    launch(cases, 2, tmp_path)


def reading(tmp_path: Path, teacher: Path, name: str, *how: str) -> list[str]:
    of_teacher = ["imports=[tests.distributed.reading]", "objective=toward", f"objective.teacher={teacher}"]
    short = ("trainer.max_steps=4", "trainer.val_check_interval=2")
    return overrides(tmp_path, "decoder", name, *of_teacher, *short, *how)


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """What `imports=[tests.distributed.reading]` registers is registered for this module's tests alone."""
    before = dict(TABLE["objective"])
    sys.modules.pop("tests.distributed.reading", None)
    yield
    TABLE["objective"].clear()
    TABLE["objective"].update(before)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A folder with a teacher, and a run in one process that reads it."""
    where = tmp_path_factory.mktemp("taught")
    teacher = folder(where / "teacher", "model=gpt2", *SMALL[:3], "model.vocab_size=360", "model.max_seq_len=32")
    txtrain.train(compose(reading(where, teacher, "alone")))
    return where


def test_a_second_model_is_read_but_not_saved(taught):
    assert all(float(row["to_teacher"]) > 0 for row in read(taught / "alone/metrics.csv"))
    names = shapes(locate(taught / "alone"))
    assert {name.partition(".")[0] for name in names} == {"model", "optimizer"}
    assert not [name for name in names if "teacher" in name]


def test_a_second_model_that_is_not_there_or_cannot_be_cut_ends_before_the_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"`objective\.teacher` must be a run's folder"):
        txtrain.train(compose(reading(tmp_path, tmp_path / "nowhere", "run")))
    of_one_head = ("model=gpt2", *SMALL[:2], "model.n_heads=1", "model.vocab_size=360", "model.max_seq_len=32")
    teacher = folder(tmp_path / "teacher", *of_one_head)
    config = compose(reading(tmp_path, teacher, "run", "strategy=tp", "trainer.devices=2"))
    with pytest.raises(ConfigError, match=r"`objective\.teacher` cannot be laid .* must divide model\.n_heads \(1\)"):
        Mesh(config, World(size=2)).check_read(open_weights(teacher).model.config, "objective.teacher")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------------------- slow

KINDS = {
    "decoder, transposed and joined": GPT2,
    "decoder, tied": ("model=gemma2", *SMALL),
    "experts": ("model=deepseek_r1", "model.mtp_depth=0", *SMALL),
    "encoder": ("model=bert", "objective=masked_lm", *SMALL),
    "two stacks": ("model=t5", "objective=span_corruption", "optimizer=adamw", *SMALL),
}


@pytest.mark.slow
def test_a_run_that_reads_a_second_model_is_the_same_under_every_strategy(taught):
    ways = [how for how in HOW if "experts" not in how and "bf16" not in how]
    cases = {how: reading(taught, taught / "teacher", how, "trainer.devices=2", *HOW[how]) for how in ways}
    train({how: Case(case) for how, case in cases.items()}, 2, taught / "group", timeout=600)
    for how in ways:
        columns = ("loss", "to_teacher", "val_to_teacher", "grad_norm")
        assert max(largest_differences(taught / "alone", taught / how, columns).values()) < 1e-5, how
        assert shapes(locate(taught / how)).keys() == shapes(locate(taught / "alone")).keys(), how


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Of each kind a folder of transformers', and checkpoints that two ranks wrote in shards."""
    where = tmp_path_factory.mktemp("sources")
    found, cases = {}, []
    for i, (kind, given) in enumerate(KINDS.items()):
        found[kind] = [folder(where / f"folder-{i}", *given)]
        for how in ("experts" if kind == "experts" else "fsdp", "tp"):
            cases.append(("is_saved", [starts(found[kind][0], HOW[how], given), str(where / f"{how}-{i}")]))
            found[kind].append(where / f"{how}-{i}")
    launch(cases, 2, where)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_strategy_reads_the_values_of_one_process(sources, n, tmp_path):
    """Three divide hardly anything."""
    ways = {1: ("ddp", "zero 3"), 2: HOW, 3: ("fsdp", "zero 3", "zero 3, bf16"), 4: OF_FOUR}[n]
    cases = []
    for kind, each in sources.items():
        for how in ways:
            if "experts" in how and kind != "experts":
                continue
            given = [[starts(source, (HOW | OF_FOUR)[how], KINDS[kind])] for source in each]
            cases += [("has_the_values_of_one_process", one) for one in given]
            cases += [("reads_a_second_model", given[0])] if n == 2 else []
    launch(cases, n, tmp_path, timeout=60 + 10 * len(cases))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_strategy_starts_a_larger_model_with_the_values_of_one_process(sources, n, tmp_path):
    """An encoder's head too, whose bias has a row for each token."""
    ways = {1: ("ddp", "zero 3"), 2: HOW, 3: ("fsdp", "zero 3")}[n]
    cases = []
    for kind in ("decoder, transposed and joined", "encoder"):
        for source in sources[kind][:2]:
            cases += [
                ("has_the_values_of_one_process", [starts(source, HOW[how], (*KINDS[kind], *LARGER))])
                for how in ways if "experts" not in how
            ]
    launch(cases, n, tmp_path, timeout=300 + 10 * len(cases))


LARGE = ("model.n_layers=12", "model.dim=512", "model.n_heads=8", "model.vocab_size=24000", "model.max_seq_len=64")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """large(kind) is a folder of some 300 MB, in one file, and a small one, each with what it is of."""
    where = tmp_path_factory.mktemp("large")
    found = {}

    def of(*kind):
        if kind not in found:
            sizes = {"large": (*kind, *LARGE), "small": (*kind, *SMALL)}
            found[kind] = [
                (folder(where / kind[0] / size, *model, max_shard_bytes=10**10), model) for size, model in sizes.items()
            ]
        return found[kind]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp", "tp", "zero 3", "experts"])
def test_no_rank_holds_more_than_its_share_and_the_largest_tensor(large, how, tmp_path):
    """Processes of their own: what another case gave back may lie in a process still."""
    kind = ("model=deepseek_r1", "model.mtp_depth=0") if how == "experts" else ("model=gpt2",)
    given = [starts(source, HOW[how], model) for source, model in large(*kind)]
    print(launch([("takes_its_share_of_memory", given)], 2, tmp_path))

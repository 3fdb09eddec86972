"""Weights that are read after the model is laid over the ranks: the same values under every strategy, and no rank holds the whole model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.distributed.group import run
from tests.models import seeded, shake
from txtrain import compose
from txtrain.hf.save import save_pretrained

pytestmark = pytest.mark.skipif("sys.platform != 'linux'", reason="/proc, deepspeed")

SMALL = ("model.n_layers=2", "model.dim=32", "model.n_heads=4")
DATA = ("data=text", "data.path=text.txt", "data.tokenizer=bytes", "data.seq_len=32", "data.global_batch_size=8", "trainer.accelerator=cpu")
HOW = {
    "ddp": ("strategy=ddp",),
    "fsdp": ("strategy=fsdp",),
    "tp": ("strategy=tp",),
    "experts": ("strategy=fsdp", "strategy.ep_size=2"),
    "fsdp, offload": ("strategy=fsdp", "strategy.cpu_offload=true"),
    **{f"zero {stage}": (f"strategy=deepspeed_stage_{stage}",) for stage in (1, 2, 3)},
    "zero 3, bf16": ("strategy=deepspeed_stage_3", "trainer.precision=bf16-mixed"),
}
OF_FOUR = {
    "hsdp": ("strategy=hsdp",),
    "fsdp_tp": ("strategy=fsdp_tp",),
    "experts, in shards": ("strategy=fsdp", "strategy.ep_size=2"),
}


def folder(where: Path, *overrides: str, max_shard_bytes: int = 100_000) -> Path:
    """Of a Hugging Face class, every value another one."""
    config = compose([*overrides, *(o for o in DATA if "vit" not in overrides[0] or not o.startswith("data"))])
    where.parent.mkdir(exist_ok=True)
    save_pretrained(shake(seeded(config.model)), where, max_shard_bytes=max_shard_bytes)
    return where


def launch(cases: list[tuple[str, list]], n: int, where: Path, timeout: float = 300) -> str:
    listed = where / f"cases-{n}-{len(list(where.glob('cases-*')))}.json"
    listed.write_text(json.dumps(cases))
    return run([sys.executable, "-m", "tests.distributed.laying_cases", str(listed)], n, where, timeout)


def starts(source: Path, how: tuple[str, ...]) -> list[str]:
    return [f"init_from={source}", *DATA, *how]


def test_two_ranks_read_their_shards(tmp_path):
    """A folder whose tensors are transposed and joined, cut by rows and columns; and what these two wrote, read by others."""
    gpt = folder(tmp_path / "gpt2", "model=gpt2", *SMALL, "model.vocab_size=257", "model.max_seq_len=32")
    saved = [("is_saved", [starts(gpt, HOW[how]), str(tmp_path / how)]) for how in ("tp", "fsdp")]
    read = [("has_the_values_of_one_process", [starts(gpt, HOW["fsdp"])]), ("has_the_values_of_one_process", [starts(tmp_path / "fsdp", HOW["tp"])])]
    launch([*saved, *read], 2, tmp_path)


def test_two_ranks_read_a_second_model_that_is_cut_as_the_first(tmp_path):
    gpt = folder(tmp_path / "gpt2", "model=gpt2", *SMALL, "model.vocab_size=257", "model.max_seq_len=32")
    launch([("reads_a_second_model", [starts(gpt, HOW[how])]) for how in ("ddp", "fsdp", "tp")], 2, tmp_path)


# ------------------------------------------------------------------------------------------------------------------------- slow

KINDS = {
    "decoder, transposed and joined": ("model=gpt2",),
    "decoder, tied": ("model=gemma2",),
    "experts": ("model=deepseek_r1", "model.mtp_depth=0"),
    "encoder": ("model=bert",),
    "two stacks": ("model=t5",),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Of each kind a folder of transformers', and checkpoints that two ranks wrote in shards."""
    where = tmp_path_factory.mktemp("sources")
    found, cases = {}, []
    for i, (kind, overrides) in enumerate(KINDS.items()):
        found[kind] = [folder(where / f"folder-{i}", *overrides, *SMALL, "model.vocab_size=257", "model.max_seq_len=32")]
        for how in ("experts" if kind == "experts" else "fsdp", "tp"):
            cases.append(("is_saved", [starts(found[kind][0], HOW[how]), str(where / f"{how}-{i}")]))
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
            cases += [("has_the_values_of_one_process", [starts(source, (HOW | OF_FOUR)[how])]) for source in each]
    launch(cases, n, tmp_path, timeout=60 + 10 * len(cases))


LARGE = ("model.n_layers=12", "model.dim=512", "model.n_heads=8", "model.vocab_size=24000")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Of each kind a folder of some 300 MB, in one file, and a small one."""
    where = tmp_path_factory.mktemp("large")
    for kind in ("model=gpt2", "model=deepseek_r1"):
        for size, overrides in (("large", LARGE), ("small", (*SMALL, "model.vocab_size=257"))):
            of_kind = [*overrides, "model.max_seq_len=64", *(["model.mtp_depth=0"] if "deepseek" in kind else [])]
            folder(where / kind / size, kind, *of_kind, max_shard_bytes=10**10)
    return where


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp", "tp", "zero 3", "experts"])
def test_no_rank_holds_more_than_its_share_and_the_largest_tensor(large, how, tmp_path):
    """Processes of their own: what another case gave back may lie in a process still."""
    kind = large / ("model=deepseek_r1" if how == "experts" else "model=gpt2")
    print(launch([("takes_its_share_of_memory", [starts(kind / size, HOW[how]) for size in ("large", "small")])], 2, tmp_path))

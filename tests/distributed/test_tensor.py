"""Matrices in parts: the same losses, gradient norms and parameters as in one process, for every type of component."""

import dataclasses as dc
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

import txtrain
from tests.compose.conftest import ROOT
from tests.distributed.tensor_cases import MODELS, Case
from tests.training import TINY, rows, write_text
from txtrain.errors import ConfigError

ALLOWED = 1e-5  # relative, float32: the order of summation
ROUNDED = 2e-2  # losses and norms in bfloat16, which has 8 bits; single logits are no measure there (another expert may be chosen)
TP, MIXED, LENGTH = "strategy=tp", "trainer.precision=bf16-mixed", 15  # positions that two processes cannot share evenly
RANDOM = "dropout"  # cannot equal one process: what is dropped within a block is each process' own


def together(arguments, n, folder, timeout=400):
    """tensor_cases in n processes; a failure shows what they wrote, and none is left behind."""
    common = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "TXTRAIN_STORE": str(folder / f"store-{os.urandom(4).hex()}"), "OMP_NUM_THREADS": "1"}
    logs = [folder / f"log-{rank}.txt" for rank in range(n)]
    command = [sys.executable, "-m", "tests.distributed.tensor_cases", *arguments]
    processes = []
    for rank, log in enumerate(logs):
        environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT))
    end = time.monotonic() + timeout
    try:
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.5 if any(p.poll() for p in processes) else 0)  # the others say why, too
        codes = [p.poll() for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    said = "\n".join(f"=== process {rank}\n{log.read_text()[-4000:]}" for rank, log in enumerate(logs))
    assert codes == [0] * n, f"exit codes {codes} (None: longer than {timeout} s)\n{said}"
    return said


def compare(cases, n, folder):
    (folder / "cases.json").write_text(json.dumps({name: dc.asdict(case) for name, case in cases.items()}))
    print(together(["compare", str(folder / "cases.json"), str(folder / "found.json")], n, folder))
    found = json.loads((folder / "found.json").read_text())
    assert found.keys() == cases.keys()
    wrong = []
    for name, case in cases.items():
        allowed = ROUNDED if MIXED in case.overrides else ALLOWED
        columns = [] if case.model == RANDOM else ["losses", "norms"] if MIXED in case.overrides else ["losses", "norms", "parameters"]
        wrong += [f"{name}: {c} {found[name][c]:.1e}, allowed {allowed:.0e} ({found[name]['which']})" for c in columns if not found[name][c] < allowed]
        wrong += [f"{name}: copies differ by {found[name]['copies']:.1e}"] if found[name]["copies"] else []
        wrong += [f"{name}: {where} is dropped wrongly" for where in found[name]["misdropped"]]
    assert not wrong, "\n".join(wrong)


def test_two_processes_equal_one(tmp_path):
    """Every type of component, over an odd number of positions."""
    compare({model: Case(model, (TP,), LENGTH) for model in MODELS}, 2, tmp_path)


@pytest.mark.slow
def test_two_processes_equal_one_however_the_step_is_made(tmp_path):
    ways = {
        "micro-batches": ("data.micro_batch_size=2",),
        "checkpointing": ("trainer.activation_checkpointing=full",),
        "selective checkpointing": ("trainer.activation_checkpointing=selective", "data.micro_batch_size=4"),
        "bfloat16": (MIXED,),
    }
    models = ("gqa", "relative", "further tokens", "moe with an auxiliary loss", "encoder", "two stacks", "images")
    compare({f"{m}, {way}": Case(m, (TP, *how), LENGTH) for way, how in ways.items() for m in models}, 2, tmp_path)


@pytest.mark.slow
def test_four_processes_equal_one(tmp_path):
    """Shards of the parts, copies of the parts, and fewer key-value heads than processes."""
    layouts = {"fsdp x tp": ("strategy=fsdp_tp", "data.micro_batch_size=2"), "ddp x tp": (TP, "strategy.tp_size=2", "data.micro_batch_size=2")}
    cases = {f"{model}, {name}": Case(model, how, LENGTH) for name, how in layouts.items() for model in MODELS}
    cases |= {f"{model}, tp of 4": Case(model, (TP,), LENGTH) for model in MODELS}
    cases["bfloat16"] = Case("gqa", ("strategy=fsdp_tp", MIXED), LENGTH)
    cases["offload"] = Case("moe", ("strategy=fsdp_tp", "strategy.cpu_offload=true"), LENGTH)
    compare(cases, 4, tmp_path)


# ---------------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_a_checkpoint_goes_from_tp_to_any_strategy_and_back(tmp_path):
    """12 steps in three parts, each under another strategy, equal 12 steps in one process."""

    def run(name, steps, *more):
        text = tmp_path / "text.txt"
        fixed = (f"data.path={text}", f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / name}", "scheduler=constant")
        return [*TINY, *fixed, "model=gemma2", "sample.n=1", f"trainer.max_steps={steps}", *more]

    def in_two(*runs):
        (tmp_path / "runs.json").write_text(json.dumps([[*r, "trainer.devices=2"] for r in runs]))
        together(["train", str(tmp_path / "runs.json")], 2, tmp_path)

    def copied(old, new):
        shutil.copytree(tmp_path / old, tmp_path / new)
        return new

    write_text(tmp_path / "text.txt")
    reference = txtrain.train(txtrain.compose(run("reference", 12))).run_dir
    txtrain.train(txtrain.compose(run("one", 4)))
    in_two(run("tp", 4, TP))
    ways = {name: f"strategy={name}" for name in ("ddp", "fsdp", "tp")}
    in_two(*(run(copied("tp", f"tp, {name}"), 8, how) for name, how in ways.items()), run(copied("one", "one, tp"), 8, TP))
    for name in ways:
        txtrain.train(txtrain.compose(run(copied(f"tp, {name}", f"tp, {name}, one"), 12)))
    in_two(*(run(copied(f"tp, {name}", f"tp, {name}, tp"), 12, TP) for name in ways), run("one, tp", 12, TP))
    ended = [f"tp, {name}, {last}" for name in ways for last in ("one", "tp")] + ["one, tp"]
    for name in ended:
        for ours, theirs in zip(rows(reference), rows(tmp_path / name), strict=True):
            for column in ("loss", "val_loss", "grad_norm"):
                if ours[column]:
                    difference = abs(float(ours[column]) / float(theirs[column]) - 1)
                    assert difference < ALLOWED, f"{name}, step {ours['step']}: {column} {difference:.1e}"
        assert (tmp_path / name / "samples.txt").read_text(), name


# ----------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["strategy=tp", "trainer.devices=3"], r"`strategy.tp_size` must divide model.n_heads \(2\), but is 3 instead. Nearest .*: 1\."),
        (["strategy=tp", "trainer.devices=2", "model.ffn.hidden_dim=31"], r"must divide model.ffn.hidden_dim \(31\), but is 2"),
        (
            ["strategy=tp", "trainer.devices=2", "model.n_heads=6", "model.dim=48", "model/attention=gqa", "model.attention.n_kv_heads=3"],
            r"must divide, or be a multiple of, model.attention.n_kv_heads \(3\), but is 2",
        ),
        (["strategy=fsdp_tp", "trainer.devices=4", "strategy.tp_size=3"], r"`strategy.tp_size` must divide the number of processes \(4\), but is 3"),
        (
            ["strategy=tp", "trainer.devices=4", "model.n_heads=4", "model.vocab_size=5"],
            r"must leave each process a part of model.vocab_size \(5\), but is 4 instead. Nearest .*: 1, 2\.",
        ),
        (["strategy=tp", "trainer.devices=2", "model/ffn=moe", "model.ffn.dense_layers=1", "model.ffn.dense_hidden_dim=9"], r"dense_hidden_dim \(9\)"),
    ],
)
def test_what_cannot_be_cut_is_refused_at_composition(overrides, said):
    with pytest.raises(ConfigError, match=said):
        txtrain.compose([*TINY, "data.path=none.txt", *overrides])

"""Experts divided over processes: the same losses, gradient norms and weights as in one process."""

import dataclasses as dc
import json
import os
import shutil
import sys

import pytest

import txtrain
from tests.distributed.group import Case, run, train
from tests.distributed.runs import largest_differences, overrides, tensors
from tests.training import TINY, rows
from txtrain.checkpoint.format import locate, read_state
from txtrain.errors import ConfigError

ALLOWED = 1e-5  # relative, float32: the order of summation
ROUNDED = 2e-2  # in bfloat16, which has 8 bits
DEEPSEEK = ("experts", "model.n_layers=3", "model.ffn.n_groups=4", "model.ffn.top_k_groups=2")  # sigmoid, groups, shared expert, bias, further token
MIXTRAL = ("decoder", "model/ffn=moe_softmax")  # auxiliary loss
GRAFT = ("decoder", "model/ffn=moe", "model.ffn.gate=softmax", "model.ffn.hidden_dim=13")  # sizes that the grouped kernel does not take
EP = ("strategy=fsdp", "strategy.ep_size=2")
HYBRID = ("strategy=hsdp", "strategy.ep_size=2")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """reference(model, *more) is the folder of its run in one process; others go beside it."""
    folder, made = tmp_path_factory.mktemp("experts"), {}

    def of(model, *more):
        key = (*model, *more)
        if key not in made:
            made[key] = txtrain.train(txtrain.compose(overrides(folder, model[0], f"reference {len(made)}", *key[1:]))).run_dir
        return made[key]

    return of


def start(n, folder, cases, starts=(), counted=(), properties=False):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "given.json"
    given = {"properties": properties, "starts": list(starts), "counted": list(counted), "cases": {name: dc.asdict(case) for name, case in cases.items()}}
    file.write_text(json.dumps(given))
    run([sys.executable, "-m", "tests.distributed.expert_cases", str(file)], n, folder, timeout=600)


def compare(reference, cases, n, allowed=ALLOWED, **given):
    """cases: by name the model, what both runs have, and what that of several processes has."""
    folder = reference(*next(iter(cases.values()))[:1]).parent
    shared = {name: reference(model, *both) for name, (model, both, _) in cases.items()}
    devices = f"trainer.devices={n}"
    made = {name: Case(overrides(folder, model[0], f"{name}, {n}", *model[1:], *both, *how, devices)) for name, (model, both, how) in cases.items()}
    start(n, folder / f"group of {n} {os.urandom(4).hex()}", made, **given)
    for name, alone in shared.items():
        found = largest_differences(alone, folder / f"{name}, {n}")
        print(f"{name}, {n} processes:", *(f"{column} {difference:.1e}" for column, difference in found.items()))
        for column, difference in found.items():
            assert difference < allowed, f"{name}, {n} processes: {column} {difference:.1e}, allowed {allowed:.0e}"


@pytest.mark.slow
def test_two_processes_equal_one(reference, tmp_path):
    """And the exchange of rows keeps its promises, and a model that is built in parts starts with the same values."""
    cases = {"deepseek": (DEEPSEEK, (), EP), "mixtral": (MIXTRAL, ("data.micro_batch_size=4",), EP)}  # its auxiliary loss is of micro-batches
    odd = ("trainer.devices=2", "strategy=fsdp", "model.ffn.n_experts=5")  # shards that do not divide the experts cut along another dimension
    starts = [overrides(tmp_path, "experts", "none", "trainer.devices=2", *how) for how in (EP, odd)]
    compare(reference, cases, 2, starts=starts, properties=True)


WAYS = {
    "micro-batches": ((), ("data.micro_batch_size=1",)),
    "checkpointing": ((), ("trainer.activation_checkpointing=full",)),
    "selective": ((), ("trainer.activation_checkpointing=selective", "data.micro_batch_size=2")),
    "offload": ((), ("strategy.cpu_offload=true",)),
    "gathered experts kept": ((), ("strategy.reshard_after_forward=false",)),
}
MUON = ("optimizer=muon", "optimizer.ns_dtype=float32")  # in bfloat16 the last bit of a gradient may turn one of eight bits
OPTIMIZERS = {
    "lion, averaged": (("optimizer=lion", "ema.decay=0.9", "ema.validate=true"), ()),
    "adafactor": (("optimizer=adafactor",), ()),
    "muon": (MUON, ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("ways", [WAYS, OPTIMIZERS], ids=["the step", "the update"])
def test_two_processes_equal_one_however_it_is_made(reference, ways):
    compare(reference, {name: (DEEPSEEK, both, (*EP, *how)) for name, (both, how) in ways.items()}, 2)


@pytest.mark.slow
def test_sizes_that_the_grouped_kernel_does_not_take(reference):
    compare(reference, {"graft": (GRAFT, (), EP)}, 2)


@pytest.mark.slow
def test_two_processes_equal_one_in_bfloat16(reference):
    compare(reference, {"bfloat16": (DEEPSEEK, ("trainer.precision=bf16-mixed",), EP)}, 2, allowed=ROUNDED)


@pytest.mark.slow
def test_two_processes_equal_one_compiled(reference):
    """One block: its graph breaks where rows travel."""
    compare(reference, {"compiled": ((*MIXTRAL, "model.n_layers=1"), ("data.micro_batch_size=4",), (*EP, "trainer.compile=true"))}, 2)


@pytest.mark.slow
def test_four_processes_equal_one(reference, tmp_path):
    """Shards and copies of divided experts, whole experts in each, and shards that cut within experts; plan says what is sent."""
    whole, mixtral = ("strategy=fsdp", "strategy.ep_size=4"), ("data.micro_batch_size=2",)
    few = ("model.ffn.n_experts=2", "model.ffn.n_groups=1", "model.ffn.top_k_groups=1")
    cases = {
        "fsdp, 2 x 2": (DEEPSEEK, (), EP),
        "hsdp, 2 x 2": (DEEPSEEK, (), (*HYBRID, "data.micro_batch_size=1")),
        "fsdp, 1 x 4": (DEEPSEEK, (), whole),
        "fsdp, 2 experts, 2 x 2": (DEEPSEEK, few, EP),
        "fsdp, 2 experts": (DEEPSEEK, few, ("strategy=fsdp",)),
        "fsdp, 2 experts, muon": (DEEPSEEK, (*few, *MUON), ("strategy=fsdp",)),
        "muon, 2 x 2": (DEEPSEEK, (*few, *MUON), EP),
        "mixtral, 2 x 2": (MIXTRAL, mixtral, EP),
        "mixtral, hsdp": (MIXTRAL, mixtral, HYBRID),
        "graft, 2 x 2": (GRAFT, (), EP),
    }
    starts = [overrides(tmp_path, "experts", "none", "trainer.devices=4", *how) for how in (EP, HYBRID, whole, ("strategy=fsdp", *few), (*EP, *few))]
    once = ("trainer.devices=4", "trainer.max_steps=2", "trainer.limit_val_batches=0", *DEEPSEEK[1:])
    ways = {"a": EP, "b": (*HYBRID, "trainer.activation_checkpointing=2"), "c": (*whole, "trainer.activation_checkpointing=full", "data.micro_batch_size=1")}
    counted = [overrides(tmp_path, "experts", name, *once, *how) for name, how in ways.items()]
    compare(reference, cases, 4, starts=starts, counted=counted)


# ---------------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_stopped_and_continued_is_bit_for_bit_the_uninterrupted_run(tmp_path):
    shape = (*DEEPSEEK[1:], *EP, "data.micro_batch_size=2", "model.dropout=0.1", "model.ffn.dropout=0.1", "trainer.devices=2", "ema.decay=0.9", "sample.n=1")
    whole, parts = (overrides(tmp_path, "experts", name, *shape) for name in ("whole", "parts"))
    train({"whole": Case(whole), "stopped": Case(parts, ["SIGTERM 5 1"])}, 2, tmp_path / "first")
    assert read_state(locate(tmp_path / "parts")).step == 6
    train({"continued": Case(parts)}, 2, tmp_path / "second")
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert one.keys() == other.keys()
    assert any("balance_bias" in name for name in one)
    assert not [name for name in one if not one[name].equal(other[name])]


@pytest.mark.slow
def test_a_checkpoint_goes_from_divided_experts_to_any_strategy_and_back(tmp_path):
    """9 steps in three parts, the second under another strategy and number of processes, equal 9 steps in one process."""
    steps = "trainer.max_steps={}".format

    def part(name, *more):
        return overrides(tmp_path, "experts", name, *DEEPSEEK[1:], *more)

    def together(n, cases):
        train({name: Case([*given, f"trainer.devices={n}"]) for name, given in cases.items()}, n, tmp_path / f"group-{os.urandom(4).hex()}")

    reference = txtrain.train(txtrain.compose(part("reference", steps(9)))).run_dir
    txtrain.train(txtrain.compose(part("one", steps(3))))
    together(2, {"divided": part("divided", steps(3), *EP)})
    ways = {"one": (1, ("strategy=auto",)), **{s: (2, (f"strategy={s}",)) for s in ("ddp", "fsdp", "tp", "deepspeed_stage_1", "deepspeed_stage_3")}}
    ways |= {"four": (4, EP), "hsdp": (4, HYBRID)}
    for name in ways:
        shutil.copytree(tmp_path / "divided", tmp_path / f"divided, {name}")
    for n in (2, 4):
        cases = {name: part(f"divided, {name}", steps(6), *how) for name, (size, how) in ways.items() if size == n}
        together(n, cases | ({"one, divided": part("one", steps(6), *EP)} if n == 2 else {}))
    txtrain.train(txtrain.compose(part("divided, one", steps(6))))
    together(2, {name: part(f"divided, {name}", steps(9), *EP) for name in ways})
    txtrain.train(txtrain.compose(part("one", steps(9))))
    for name in ["one", *(f"divided, {name}" for name in ways)]:
        for column, difference in largest_differences(reference, tmp_path / name, ("loss", "grad_norm")).items():
            print(f"{name}: {column} {difference:.1e}")
            assert difference < ALLOWED, f"{name}: {column} {difference:.1e}"


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_in_one_process_changes_no_expert(tmp_path):
    run_dir = tmp_path / "run"
    given = overrides(tmp_path, "experts", "run", *DEEPSEEK[1:], *EP, "trainer.devices=2")
    train({"before": Case([*given, "trainer.max_steps=2"])}, 2, tmp_path / "first")
    before = tensors(run_dir)
    train({"after": Case([*given, "trainer.max_steps=3"], ["POISON 2 1"])}, 2, tmp_path / "second")
    after = tensors(run_dir)
    assert read_state(locate(run_dir)).step == 3
    assert not [name for name in before if not before[name].equal(after[name])]


@pytest.mark.slow
def test_an_export_has_the_weights_of_all_experts(tmp_path):
    import torch

    given = overrides(tmp_path, "experts", "run", *EP, "trainer.devices=2", "trainer.max_steps=2")
    train({"run": Case(given)}, 2, tmp_path / "group")
    model = txtrain.load_pretrained(str(tmp_path / "run"))
    txtrain.save_pretrained(model, str(tmp_path / "out"))
    again = txtrain.load_pretrained(str(tmp_path / "out"))
    saved = tensors(tmp_path / "run")
    for name, p in again.named_parameters():
        assert torch.equal(p, saved[f"model.{name}"]), name


# ----------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["strategy=fsdp", "strategy.ep_size=3", "trainer.devices=2"], r"`strategy.ep_size` must divide the ranks .* \(2\), but is 3 .*: 1, 2\."),
        (["strategy=fsdp", "strategy.ep_size=0", "trainer.devices=2"], r"`strategy.ep_size` must divide the ranks .* \(2\), but is 0"),
        (["strategy=hsdp", "strategy.ep_size=4", "trainer.devices=4"], r"hold shards of one model \(2\), but is 4 instead. Nearest that both allow: 1, 2\."),
        (["strategy=fsdp", "strategy.ep_size=4", "trainer.devices=4", "model.ffn.n_experts=6"], r"divide model.ffn.n_experts \(6\), but is 4 .*: 1, 2\."),
        (["strategy=fsdp", "strategy.ep_size=2", "trainer.devices=2", "model/ffn=swiglu"], r"must be 1 with model/ffn=swiglu, .* is 2 .*: 1\."),
        (["strategy=fsdp_tp", "strategy.ep_size=2"], r"no key ep_size. Only strategy=fsdp, strategy=hsdp have it. Tensor parallelism gives"),
        (["strategy=deepspeed_stage_2", "strategy.ep_size=2"], r"no key ep_size. Only strategy=fsdp, strategy=hsdp have it. ZeRO"),
        (["strategy=ddp", "strategy.ep_size=2"], r"no key ep_size. Only strategy=fsdp, strategy=hsdp have it. Copies"),
        (["strategy=fsdp", "strategy.expert_parallel_degree=2"], r"Did you mean strategy.ep_size\?"),
    ],
)
def test_what_cannot_be_divided_is_refused_at_composition(given, said):
    with pytest.raises(ConfigError, match=said):
        txtrain.compose([*TINY, "data.path=none.txt", "model/ffn=moe", *given])


def test_one_process_does_not_take_division_for_granted(monkeypatch):
    """The number of processes is known only when they have started."""
    monkeypatch.delenv("RANK", raising=False)
    config = txtrain.compose([*TINY, "data.path=none.txt", "model/ffn=moe", *EP])
    with pytest.raises(ConfigError, match=r"`strategy.ep_size` must divide .* \(1\), but is 2 instead"):
        txtrain.LitModule(config)

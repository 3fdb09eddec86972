"""Matrices in parts: the same losses, gradient norms and parameters as in one process, for every type of component."""

import dataclasses as dc
import json
import sys

import pytest
from torch import nn

import txtrain
from tests.distributed import tensor_cases
from tests.distributed.group import run
from tests.distributed.tensor_cases import MODELS
from tests.training import TINY
from txtrain.errors import ConfigError
from txtrain.registry import TABLE

ALLOWED = 1e-5  # relative, float32: the order of summation
ROUNDED = 2e-2  # losses and norms in bfloat16, which has 8 bits; single logits are no measure there (another expert may be chosen)
TP, MIXED, LENGTH = "strategy=tp", "trainer.precision=bf16-mixed", 15  # positions that two processes cannot share evenly
RANDOM = "dropout"  # cannot equal one process: what is dropped within a block is each process' own


def compare(cases, n, folder):
    (folder / "cases.json").write_text(json.dumps({name: dc.asdict(case) for name, case in cases.items()}))
    command = [sys.executable, "-m", "tests.distributed.tensor_cases", str(folder / "cases.json"), str(folder / "found.json")]
    print(run(command, n, folder, timeout=600))
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


# Each way that a component is cut, once: rows and shared rows, heads of a table, the vocabulary with padding, latents, experts, both stacks.
COVERING = ("gqa", "mqa: its head is whole", "relative", "padded tokens, scaled", "further tokens", "encoder", "two stacks")


@pytest.mark.parametrize("models", [COVERING, pytest.param([m for m in MODELS if m not in COVERING], marks=pytest.mark.slow)])
def test_two_processes_equal_one(models, tmp_path):
    """Every type of component, over an odd number of positions."""
    compare({model: tensor_cases.Case(model, (TP,), LENGTH) for model in models}, 2, tmp_path)


@pytest.mark.slow
def test_two_processes_equal_one_however_the_step_is_made(tmp_path):
    ways = {
        "micro-batches": ("data.micro_batch_size=2",),
        "checkpointing": ("trainer.activation_checkpointing=full",),
        "selective checkpointing": ("trainer.activation_checkpointing=selective", "data.micro_batch_size=4"),
        "bfloat16": (MIXED,),
    }
    models = ("gqa", "relative", "further tokens", "moe with an auxiliary loss", "encoder", "two stacks", "images")
    compare({f"{m}, {way}": tensor_cases.Case(m, (TP, *how), LENGTH) for way, how in ways.items() for m in models}, 2, tmp_path)


@pytest.mark.slow
def test_four_processes_equal_one(tmp_path):
    """Shards of the parts, copies of the parts, and fewer key-value heads than processes."""
    layouts = {"fsdp x tp": ("strategy=fsdp_tp", "data.micro_batch_size=2"), "ddp x tp": (TP, "strategy.tp_size=2", "data.micro_batch_size=2")}
    cases = {f"{model}, {name}": tensor_cases.Case(model, how, LENGTH) for name, how in layouts.items() for model in MODELS}
    cases |= {f"{model}, tp of 4": tensor_cases.Case(model, (TP,), LENGTH) for model in MODELS}
    cases["bfloat16"] = tensor_cases.Case("gqa", ("strategy=fsdp_tp", MIXED), LENGTH)
    cases["offload"] = tensor_cases.Case("moe", ("strategy=fsdp_tp", "strategy.cpu_offload=true"), LENGTH)
    compare(cases, 4, tmp_path)


# ----------------------------------------------------------------------------------------------------------- what is refused


class Auxiliary(nn.Module):
    """With a loss that each process would add."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x_BTD, record=None, loss_scale=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["strategy=tp", "trainer.devices=3"], r"`strategy.tp_size` must divide model.n_heads \(2\), but is 3 instead. Nearest .*: 1\."),
        (["strategy=tp", "trainer.devices=2", "model.ffn.hidden_dim=31"], r"must divide model.ffn.hidden_dim \(31\), but is 2"),
        (
            ["strategy=tp", "trainer.devices=2", "model.n_heads=6", "model.dim=48", "model/attention=gqa", "model.attention.n_kv_heads=3"],
            r"must divide, or be a multiple of, model.attention.n_kv_heads \(3\), but is 2",
        ),
        (["strategy=fsdp_tp", "trainer.devices=4", "strategy.tp_size=3"], r"`strategy.tp_size` must divide the number of ranks \(4\), but is 3"),
        (
            ["strategy=tp", "trainer.devices=4", "model.n_heads=4", "model.vocab_size=5"],
            r"must leave each rank a part of model.vocab_size \(5\), but is 4 instead. Nearest .*: 1, 2\.",
        ),
        (["strategy=tp", "trainer.devices=2", "model/ffn=tests_auxiliary"], r"`strategy` must be without tensor parallelism with model/ffn=tests_auxiliary"),
        (["strategy=tp", "trainer.devices=2", "model/ffn=moe", "model.ffn.dense_layers=1", "model.ffn.dense_hidden_dim=9"], r"dense_hidden_dim \(9\)"),
    ],
)
def test_what_cannot_be_cut_is_refused_at_composition(given, said, monkeypatch):
    monkeypatch.setitem(TABLE, "ffn", dict(TABLE["ffn"]))  # other tests of this process shall not find it
    txtrain.component("ffn", "tests_auxiliary")(Auxiliary)
    with pytest.raises(ConfigError, match=said):
        txtrain.compose([*TINY, "data.path=none.txt", *given])

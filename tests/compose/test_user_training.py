"""The user's own parts, one class in one file outside the package: they train, resume and generate."""

import json
import re

import pytest
import yaml

import txtrain
from tests.cases import some
from tests.compose.conftest import ROOT
from tests.training import rows, weights, write_text
from txtrain.cli.main import main
from txtrain.errors import RunError
from txtrain.monitor.metrics_csv import EXACT, read

SMALL = (
    "model.n_layers=2",
    "model.dim=32",
    "model.n_heads=2",
    "model.vocab_size=257",
    "model.max_seq_len=32",
    "data.tokenizer=bytes",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "trainer.limit_val_batches=2",
    "trainer.val_check_interval=4",
    "scheduler.warmup_steps=0",
    "sample.n=0",
)
TEXT = ("data=text", "data.path=text.txt")


def learns(folder, *overrides: str) -> list[dict[str, str]]:
    """The rows of a run of 8 steps over one and the same batch, at whose end the loss is below that at the start."""
    write_text(folder / "text.txt")
    data = () if any(o.startswith("data=") for o in overrides) else TEXT
    config = txtrain.compose([*overrides, *data, *SMALL, "run_dir=run", "trainer.max_steps=8", "trainer.overfit_batches=1"])
    table = rows(txtrain.train(config).run_dir)
    first, last = float(table[0]["loss"]), float(table[-1]["loss"])
    assert last < first, f"loss {first} at the start, {last} at the end"
    return table


FFN = """
import os
import signal

import lightning.pytorch as pl
import torch
import txtrain

@txtrain.component("ffn", "mine")
class Mine(torch.nn.Module):
    def __init__(self, dim: int, width: int = 8, bias: bool = True):
        super().__init__()
        self.up = torch.nn.Linear(dim, width, bias=bias)
        self.down = torch.nn.Linear(width, dim, bias=bias)

    def forward(self, x):
        return self.down(self.up(x).square())

class Stop(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, i):
        if module.step == int(os.environ.get("STOP_AT", -1)):
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.slow
def test_an_ffn_of_ones_own_trains_resumes_and_generates(clean_room, cli, capsys):
    (clean_room / "mine.py").write_text(FFN)
    write_text(clean_room / "text.txt")
    mine = "imports=[mine.py]"
    line = [mine, "model=gpt2", "model/ffn=mine", "model.ffn.width=12", *TEXT, *SMALL, "trainer.max_steps=8", "callbacks.stop._target_=mine.Stop"]
    whole = cli(*line, "run_dir=whole")
    assert whole.returncode == 0, whole.stderr
    assert "ffn: mlp -> mine; kept bias=true; dropped activation=gelu_tanh" in whole.stdout
    stopped = cli(*line, "run_dir=parts", STOP_AT="5")
    assert stopped.returncode == 75, stopped.stderr

    assert main(["resume=parts"]) == 2  # in this process, which has not imported it
    said = capsys.readouterr().err
    assert "imports=[" in said
    assert "callbacks.stop._target_=..." in said
    resumed = cli("resume=parts", mine, "callbacks.stop._target_=mine.Stop")
    assert resumed.returncode == 0, resumed.stderr
    assert rows(clean_room / "parts") == rows(clean_room / "whole")
    assert weights(clean_room / "parts") == weights(clean_room / "whole")

    line = ["generate", "checkpoint=parts", "prompt=The ", "max_new_tokens=4"]
    assert main(line) == 2
    assert "name it again" in capsys.readouterr().err
    said = cli(*line, mine)
    assert said.stdout.startswith("The "), said.stderr


def test_the_option_that_the_documentation_shows_trains(clean_room, forget):
    (code,) = re.findall(r"```python\n(# mine\.py\n.*?)```", (ROOT / "docs/axes.md").read_text(), re.DOTALL)
    (command,) = re.findall(r"^txtrain (imports=\[mine\.py\] .*)$", (ROOT / "docs/axes.md").read_text(), re.MULTILINE)
    (clean_room / "mine.py").write_text(code)
    learns(clean_room, *command.split())
    assert yaml.safe_load((clean_room / "run/config.yaml").read_text())["model"]["ffn"] == {"type": "maxout", "pieces": 4}


def test_the_data_set_that_the_documentation_shows_trains(clean_room, forget):
    (code,) = re.findall(r"```python\n(import txtrain\n.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    (clean_room / "mine.py").write_text(code)
    (clean_room / "notes.txt").write_text("\n\n".join(f"Note {i} is about {i} and nothing else." for i in range(300)))
    table = learns(clean_room, "imports=[mine.py]", "data=mine")
    assert [row["step"] for row in table if row["val_loss"]] == ["4", "8"]


def test_a_data_set_with_a_validation_of_its_own_is_validated_on_that(clean_room, forget):
    (clean_room / "mine.py").write_text(
        "import txtrain\n\n@txtrain.component('data', 'counting')\nclass Counting:\n"
        "    has_validation = True\n\n"
        "    def __init__(self, n: int = 200, seed: int = 0):\n        self.n, self.seed = n, seed\n\n"
        "    def documents(self, split):\n"
        "        if split == 'validation':\n            yield 'zzzzzzzz ' * 40\n            return\n"
        "        for i in range(self.n):\n            yield ' '.join(str(k) for k in range(i, i + 20))\n"
    )
    table = learns(clean_room, "imports=[mine.py]", "data=counting", "data.n=100")
    assert float(table[-1]["val_loss"]) > float(table[-1]["loss"]) + 0.1, "letters that were never seen are not harder than digits"


SAMPLES = """
import torch, txtrain

@txtrain.component("data", "parity")
class Parity:
    has_validation = True

    def __init__(self, seq_len: int):
        self.seq_len = seq_len

    def samples(self, split):
        return [{"input_ids": torch.arange(i, i + self.seq_len) % 7} for i in range(100 if split == "train" else 20)]
"""


def test_a_data_set_of_anything_but_text_needs_no_tokenizer(clean_room, forget):
    (clean_room / "mine.py").write_text(SAMPLES)
    learns(clean_room, "imports=[mine.py]", "data=parity")
    assert main(["generate", "checkpoint=run", "prompt=1"]) == 2


NORM_POSITION = """
import torch, txtrain

@txtrain.component("norm_position", "halved")
class Halved(torch.nn.Module):
    def __init__(self, dim, norm):
        super().__init__()
        self.norm = norm(dim)

    def forward(self, x, f):
        return x + 0.5 * f(self.norm(x))
"""
POSITION = """
import torch, txtrain
from txtrain.model.position.encodings import Position

@txtrain.component("position", "late")
class Late(Position):
    def __init__(self, dim: int, slope: float = 0.1):
        super().__init__()
        self.slope = slope
        self.direction = torch.nn.Parameter(torch.empty(dim))

    def reset_parameters(self):
        torch.nn.init.ones_(self.direction)

    def add(self, x, position_ids, *_):
        return x + self.slope * position_ids[..., None] * self.direction
"""
NORM = """
import torch, txtrain

@txtrain.component("norm", "scaled")
class Scaled(torch.nn.Module):
    def __init__(self, dim, factor: float = 2.0):
        super().__init__()
        self.factor, self.dim = factor, dim

    def forward(self, x):
        return self.factor * torch.nn.functional.normalize(x, dim=-1) * self.dim**0.5
"""
ATTENTION = """
import dataclasses as dc
import torch, txtrain

@txtrain.component("attention", "average")
class Average(torch.nn.Module):
    @dc.dataclass(frozen=True, kw_only=True)
    class Config:
        rank: int = 8

    def __init__(self, dim: int, rank: int):
        super().__init__()
        self.down, self.up = torch.nn.Linear(dim, rank), torch.nn.Linear(rank, dim)

    def forward(self, x, context):
        n = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return self.up(self.down(x).cumsum(1) / n)
"""
OPTIMIZER = """
import torch, txtrain

@txtrain.component("optimizer", "sign")
class Sign(torch.optim.Optimizer):
    def __init__(self, params, lr, beta: float = 0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                m = state.setdefault("m", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["beta"])
                state["step"] = state.get("step", 0) + 1
                p.sub_(group["lr"] * m.sign() / state["step"] ** 0.5)
"""
SCHEDULER = """
import txtrain

@txtrain.component("scheduler", "steps")
class Steps:
    def __init__(self, every: int = 2, factor: float = 0.5):
        self.every, self.factor = every, factor

    def __call__(self, step):
        return self.factor ** (step // self.every)
"""
OBJECTIVE = """
import txtrain
from txtrain.objectives.causal_lm import CausalLM

@txtrain.component("objective", "doubled")
class Doubled(CausalLM):
    def __init__(self, weight: float = 2.0):
        self.weights = {"loss": weight}
"""
PARTS = {
    "norm_position": (NORM_POSITION, ["model.norm_position=halved"]),
    "position": (POSITION, ["model/position=late", "model.position.slope=0.05"]),
    "norm": (NORM, ["model/norm=scaled"]),
    "attention": (ATTENTION, ["model/attention=average", "model.attention.rank=4"]),
    "optimizer": (OPTIMIZER, ["optimizer=sign", "optimizer.beta=0.8", "optimizer.lr=1e-3"]),
    "scheduler": (SCHEDULER, ["scheduler=steps", "scheduler.every=3"]),
    "objective": (OBJECTIVE, ["objective=doubled"]),
}


@pytest.mark.parametrize("axis", some(PARTS, ("attention", "position", "optimizer", "objective")))
def test_a_part_of_ones_own_trains_and_resumes(axis, clean_room, forget):
    code, overrides = PARTS[axis]
    (clean_room / "mine.py").write_text(code)
    table = learns(clean_room, "imports=[mine.py]", *overrides)
    if axis == "scheduler":
        assert [float(row["lr"]) / 1e-3 for row in table] == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    resumed = txtrain.train(txtrain.compose(["resume=run", "trainer.max_steps=10"]))
    assert read(resumed.run_dir / "metrics.csv")[-1]["step"] == "10"
    assert set(EXACT) <= set(read(resumed.run_dir / "metrics.csv")[-1])


def test_a_number_that_an_optimizer_of_ones_own_counts_with_is_resumed(clean_room, forget):
    (clean_room / "mine.py").write_text(OPTIMIZER)
    overrides = ["imports=[mine.py]", *PARTS["optimizer"][1], "scheduler=constant"]
    table = learns(clean_room, *overrides)
    half = txtrain.compose([*overrides, *TEXT, *SMALL, "run_dir=half", "trainer.max_steps=4", "trainer.overfit_batches=1"])
    txtrain.train(half)
    resumed = txtrain.train(txtrain.compose(["resume=half", "imports=[mine.py]", "trainer.max_steps=8"]))
    assert rows(resumed.run_dir) == table
    assert weights(resumed.run_dir) == weights(clean_room / "run")


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        ('self.state[p]["history"] = [0.5]', "'history' of a parameter as list"),
        ('self.state[p]["norm"] = None', "'norm' of a parameter as NoneType"),
        ('self.state["all"]["step"] = 1', "state['all'], which is no parameter's"),
        ('group["step"] = group.get("step", 0) + 1', "'step' in a parameter group"),
    ],
)
def test_what_an_optimizer_keeps_and_no_checkpoint_could_hold_is_refused_before_anything_is_written(kept, told, clean_room, forget):
    (clean_room / "mine.py").write_text(OPTIMIZER.replace('state["step"] = state.get("step", 0) + 1', f'{kept}; state["step"] = 1'))
    with pytest.raises(txtrain.ConfigError, match=f"`optimizer` must keep .*, but sign keeps {re.escape(told)} instead"):
        learns(clean_room, "imports=[mine.py]", *PARTS["optimizer"][1])
    assert not (clean_room / "run").exists()


def test_what_an_optimizer_keeps_from_its_second_step_on_makes_the_run_fail(clean_room, forget):
    late = 'state["step"] = state.get("step", 0) + 1; state |= {"history": []} if state["step"] > 1 else {}'
    (clean_room / "mine.py").write_text(OPTIMIZER.replace('state["step"] = state.get("step", 0) + 1', late))
    with pytest.raises(RunError, match=r"`optimizer` must keep .*, but Sign keeps 'history' of a parameter as list"):
        learns(clean_room, "imports=[mine.py]", *PARTS["optimizer"][1])
    assert json.loads((clean_room / "run/run.json").read_text())["status"] == "failed"

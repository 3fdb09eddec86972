"""Figures of each layer are those of one process, whoever holds which part; two processes are one W&B run."""

import os

import pytest

import txtrain
from tests.distributed.group import Case, train
from tests.distributed.runs import largest_differences, overrides
from tests.wandb_file import wandb_files
from txtrain.monitor.metrics_csv import read

STATS = ("trainer.max_steps=2", "trainer.val_check_interval=2", "layer_stats.every_n_steps=1")
OUTPUTS = "layer_stats.activations=true"
HOW = {
    "fsdp": ("strategy=fsdp", "data.micro_batch_size=2", OUTPUTS, "logger=wandb"),
    "tp": ("strategy=tp",),
}


def compare(folder, model, how, n):
    reference = txtrain.train(txtrain.compose(overrides(folder, model, "reference", *STATS, OUTPUTS))).run_dir
    train({name: Case(overrides(folder, model, name, f"trainer.devices={n}", *STATS, *given)) for name, given in how.items()}, n, folder / "group")
    for name in how:
        first = read(folder / name / "metrics.csv")[0]
        columns = tuple(column for column in first if "/" in column and not column.startswith("time/"))
        assert {"grad_norm/blocks.0", "weight_norm/embedding"} <= set(columns)
        assert ("activation_rms/blocks.1" in columns) == (OUTPUTS in how[name])
        for column, difference in largest_differences(reference, folder / name, columns).items():
            assert difference < 1e-5, f"{name}: {column} {difference:.1e}, allowed 1e-05"


@pytest.mark.slow
def test_layers_in_two_processes_are_those_of_one_and_one_wandb_run(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    compare(tmp_path, "decoder", HOW, 2)
    (file,) = wandb_files(tmp_path / "fsdp")
    assert file.steps == [1, 2]
    assert file.exit_code == 0
    assert file.config["run"]["hardware"]["processes"] == 2
    assert "grad_norm/blocks.0" in file.history[0]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["experts", "two stacks"])
def test_layers_of_other_models_in_four_processes_are_those_of_one(tmp_path, model):
    how = {name: (f"strategy={name}", OUTPUTS) for name in ("ddp", "hsdp", "fsdp")}
    how |= {"fsdp_tp": ("strategy=fsdp_tp",), "tp of 2": ("strategy=tp", "strategy.tp_size=2")}
    compare(tmp_path, model, how, 4)

"""Figures of each layer: sums that are those of the whole, rows that have them, and nothing where they are not asked for."""

import math

import pytest
import torch

from tests.training import rows, tiny, weights
from txtrain import compose
from txtrain.errors import ConfigError
from txtrain.monitor.layer_stats import layer_of
from txtrain.monitor.metrics_csv import read
from txtrain.training.run import train

STATS = ("layer_stats.every_n_steps=4", "trainer.log_every_n_steps=2", "trainer.max_steps=8", "trainer.val_check_interval=8", "layer_stats.activations=true")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("layers")


@pytest.fixture(scope="module")
def run(folder):
    return train(tiny(folder, f"run_dir={folder / 'run'}", *STATS)).run_dir


def values(row, what):
    return {name.partition("/")[2]: float(value) for name, value in row.items() if name.startswith(f"{what}/") and value}


def test_the_layers_norms_make_up_the_norm_of_all(run):
    asked = [row for row in read(run / "metrics.csv") if int(row["step"]) % 4 == 0]
    assert len(asked) == 2
    for row in asked:
        norms = values(row, "grad_norm")
        assert set(norms) == {"blocks.0", "blocks.1", "embedding", "head", "final_norm"}
        assert math.hypot(*norms.values()) == pytest.approx(float(row["grad_norm"]), rel=1e-5)


def test_weight_norms_are_those_of_the_weights_that_the_step_began_with(run, folder):
    """Step 8 of this run begins with what the other leaves behind after step 7."""
    seven = train(tiny(folder, f"run_dir={folder / 'seven'}", *STATS[1:2], "trainer.max_steps=7", "scheduler=constant")).run_dir
    again = train(tiny(folder, f"run_dir={folder / 'eight'}", *STATS, "scheduler=constant")).run_dir
    squares = {}
    for name, data in weights(seven).items():
        if name.startswith("model."):
            layer = layer_of(name.removeprefix("model."))
            squares[layer] = squares.get(layer, 0.0) + float(torch.frombuffer(bytearray(data), dtype=torch.float32).double().square().sum())
    norms = values(read(again / "metrics.csv")[-1], "weight_norm")
    assert norms == pytest.approx({layer: square**0.5 for layer, square in squares.items()}, rel=1e-6)


def test_rows_between_have_none_and_the_training_is_the_same(run, folder):
    between = [row for row in read(run / "metrics.csv") if int(row["step"]) % 4]
    assert between
    assert not any(values(row, what) for row in between for what in ("grad_norm", "weight_norm", "activation_rms"))
    without = train(tiny(folder, f"run_dir={folder / 'without'}", *STATS[1:4])).run_dir
    assert rows(without) == rows(run)
    assert weights(without) == weights(run)
    assert not any("/" in name and not name.startswith("time/") for name in read(without / "metrics.csv")[0])


def test_micro_batches_and_checkpointed_activations_change_none_of_them(run, folder):
    given = (*STATS, "data.micro_batch_size=2", "trainer.activation_checkpointing=full")
    other = train(tiny(folder, f"run_dir={folder / 'micro'}", *given)).run_dir
    for a, b in zip(read(run / "metrics.csv"), read(other / "metrics.csv"), strict=True):
        for what in ("grad_norm", "weight_norm", "activation_rms"):
            assert values(a, what) == pytest.approx(values(b, what), rel=1e-5)
    assert set(values(read(run / "metrics.csv")[-1], "activation_rms")) == {"blocks.0", "blocks.1"}


def test_each_mixture_tells_its_load(folder):
    given = ("model=deepseek_r1", "model.n_layers=2", "trainer.max_steps=2", "layer_stats.every_n_steps=1")
    done = train(tiny(folder, f"run_dir={folder / 'experts'}", *given)).run_dir
    for row in read(done / "metrics.csv"):
        loads = values(row, "moe_max_load")
        assert loads
        assert sum(loads.values()) / len(loads) == pytest.approx(float(row["moe_max_load"]), rel=1e-6)


def test_a_resumed_run_without_them_keeps_the_columns_that_its_file_has(folder):
    place = folder / "kept"
    train(tiny(folder, f"run_dir={place}", *STATS))
    before = read(place / "metrics.csv")
    train(tiny(folder, f"run_dir={place}", *STATS[1:2], "trainer.max_steps=10", "trainer.val_check_interval=8"))
    after = read(place / "metrics.csv")
    assert after[: len(before)] == before
    assert len(after) == len(before) + 1
    assert not values(after[-1], "grad_norm")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("layer_stats.every_n_steps=15", "must be a multiple of trainer.log_every_n_steps (10) or null, but is 15 instead. Nearest: 20."),
        ("layer_stats.every_n_steps=0", "must be at least 1 or null"),
        ("layer_stats.activations=true", "`layer_stats.every_n_steps` must be given with layer_stats.activations=true."),
        ("layer_stats.every_n_steps=10 strategy=deepspeed_stage_1", "flat gradients have no layers. Nearest: strategy=fsdp."),
        ("layer_stats.every_n_steps=10 layer_stats.activations=true strategy=tp", "`layer_stats.activations` must be false with strategy=tp"),
    ],
)
def test_what_cannot_be_told_is_refused_with_its_reason(given, said):
    with pytest.raises(ConfigError) as e:
        compose(["data=python_docs", *given.split()])
    assert said in str(e.value)


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("blocks.11.attention.q_proj.weight", "blocks.11"),
        ("encoder.blocks.0.ffn.up_proj.bias", "encoder.blocks.0"),
        ("mtp.0.block.ffn.experts.gate_proj", "mtp.0.block"),
        ("mtp.0.final_norm.weight", "mtp.0"),
        ("embedding.token.weight", "embedding"),
        ("encoder.final_norm.weight", "encoder.final_norm"),
        ("final_norm.weight", "final_norm"),
        ("head.weight", "head"),
    ],
)
def test_every_parameter_belongs_to_a_layer(parameter, layer):
    assert layer_of(parameter) == layer

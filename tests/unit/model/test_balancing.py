"""Experts stay evenly visited with the bias rule or the auxiliary loss, and do not without."""

import pytest
import torch

from tests.models import ids, seeded, shake
from tests.models import tiny as model_of
from tests.training import rows, tiny, weights
from txtrain.model import options
from txtrain.model.ffn import balancing
from txtrain.monitor.metrics_csv import read
from txtrain.objectives.base import build_objective
from txtrain.training.data_module import DataModule
from txtrain.training.run import train

SMALL = (
    "model=deepseek_r1",
    "model.ffn.dense_layers=0",
    "model.ffn.hidden_dim=16",
    "model.attention.kv_rank=8",
)


def mixture(**knobs):
    return shake(seeded(model_of(ffn=options.MoEConfig(type="moe", **knobs))))


def test_a_bias_moves_by_its_rate_towards_even():
    model = mixture(n_experts=4, bias_update_rate=0.01)
    balancing.update(model, {"blocks.1": torch.tensor([4.0, 8.0, 12.0, 8.0])})
    assert model.blocks[1].ffn.balance_bias.tolist() == pytest.approx([0.01, 0.0, -0.01, 0.0])
    assert (model.blocks[0].ffn.balance_bias == 0).all()
    balancing.update(mixture(bias_update_rate=0.0), {"blocks.1": torch.ones(8)})


def test_counts_add_up_over_forwards_and_the_model_is_called_as_it_is():
    model = mixture()
    observed = balancing.Observed(model)
    outputs = [observed(ids(), labels=ids()), observed(ids(4, 8, seed=1))]
    assert torch.equal(outputs[0].logits, model(ids()).logits)
    assert set(observed.counts) == {"blocks.0", "blocks.1"}
    for layer, counts in observed.counts.items():
        assert torch.equal(counts, sum(out.aux[f"{layer}.expert_counts"] for out in outputs))
    assert observed.config is model.config


def test_padding_behind_packed_documents_is_no_visit(tmp_path):
    """It would be all of one token, and the balance would be sought for it."""
    config = tiny(tmp_path, *SMALL, "data.packing=best_fit")
    data, objective, model = DataModule(config), build_objective(config), balancing.Observed(seeded(config.model))
    data.prepare()
    n_real = n_all = 0
    for batch, _ in data.first(data.n_train):
        objective(model, batch, objective.denominators(batch))
        n_real, n_all = n_real + int(batch["attention_mask"].sum()), n_all + batch["attention_mask"].numel()
    assert n_real < n_all
    assert model.counts["blocks.0"].sum() == model.counts["blocks.1"].sum() == n_real * config.model.ffn.top_k


def test_load_is_the_largest_share_over_the_mean():
    assert balancing.measured({}) == {}
    counts = {"a": torch.tensor([2.0, 2.0]), "b": torch.tensor([4.0, 0.0])}
    assert balancing.measured(counts)["moe_max_load"].item() == pytest.approx(1.5)


def test_micro_batches_leave_the_same_bias(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = train(tiny(tmp_path, *SMALL, "run_dir=whole", "trainer.max_steps=3"))
    parts = train(tiny(tmp_path, *SMALL, "run_dir=parts", "trainer.max_steps=3", "data.micro_batch_size=2"))
    a, b = (weights(r.run_dir) for r in (whole, parts))
    names = [name for name in a if name.endswith("balance_bias")]
    assert len(names) == 3, "two layers, and the module for the second token"
    for name in names:
        assert a[name] == b[name]
        assert any(a[name])


def test_a_resumed_run_has_the_bias_of_one_that_was_not_interrupted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at_once = train(tiny(tmp_path, *SMALL, "run_dir=at_once", "trainer.max_steps=8", "scheduler=constant"))
    train(tiny(tmp_path, *SMALL, "run_dir=twice", "trainer.max_steps=4", "scheduler=constant"))
    twice = train(tiny(tmp_path, *SMALL, "run_dir=twice", "trainer.max_steps=8", "scheduler=constant"))
    assert weights(at_once.run_dir) == weights(twice.run_dir)
    assert rows(at_once.run_dir)[-1] == rows(twice.run_dir)[-1]


@pytest.mark.parametrize(
    ("with_rule", "without"),
    [
        pytest.param(("model.ffn.bias_update_rate=0.02",), ("model.ffn.bias_update_rate=0",), id="bias", marks=pytest.mark.slow),
        pytest.param(
            ("model/ffn=moe_softmax", "model.ffn.aux_weight=0.05"), ("model/ffn=moe_softmax", "model.ffn.aux_weight=0"),
            id="auxiliary loss", marks=pytest.mark.slow,
        ),
    ],
)
def test_load_stays_even_with_the_rule_and_does_not_without(tmp_path, monkeypatch, with_rule, without):
    monkeypatch.chdir(tmp_path)
    seen = {}
    for name, overrides in (("with", with_rule), ("without", without)):
        steps = ("trainer.max_steps=60", "trainer.val_check_interval=60", f"run_dir={name}")
        run = train(tiny(tmp_path, *SMALL, *steps, *overrides))
        found = read(run.run_dir / "metrics.csv")
        seen[name] = sum(float(row["moe_max_load"]) for row in found[-10:]) / 10
        mtp = [float(row["mtp_loss"]) for row in found]
        assert mtp[-1] < 0.5 * mtp[0], f"the loss of the second token goes from {mtp[0]:.2f} to {mtp[-1]:.2f} only"
    assert seen["with"] < 1.8, f"largest share over mean: {seen}"
    assert seen["without"] > 2.2, f"largest share over mean: {seen}"

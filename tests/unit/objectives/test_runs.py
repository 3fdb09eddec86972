"""What holds for every objective: the same batches, losses and runs, however they are made."""

import csv
import dataclasses as dc
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import txtrain
from tests.cases import some
from tests.models import shake
from tests.training import weights
from tests.unit.objectives.conftest import KINDS
from txtrain.data.samples.draws import Draws
from txtrain.model.ffn.balancing import Observed
from txtrain.monitor.metrics_csv import WALL_CLOCK
from txtrain.objectives.prefix_lm import PrefixLM
from txtrain.registry import TABLE
from txtrain.training.batches import cut
from txtrain.training.callback import RunCallback
from txtrain.training.data_module import DataModule
from txtrain.training.module import LitModule

EVERY = pytest.mark.parametrize("kind", KINDS)


def batches(config, n: int = 3, *, start: int = 0, rank: tuple[int, int] | None = None) -> list[dict[str, torch.Tensor]]:
    module = DataModule(config)
    module.start_step = start
    if rank is not None:
        module.trainer = SimpleNamespace(global_rank=rank[0], world_size=rank[1])
    return list(itertools.islice(module.train_dataloader(), n))


def joined(parts: list[dict[str, torch.Tensor]], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Shares of a batch side by side; a share of short samples may be padded less than the whole."""
    fill = {"labels": -100, "input_ids": 256}

    def widened(name: str, x: torch.Tensor) -> torch.Tensor:
        missing = like[name].shape[-1] - x.shape[-1] if x.ndim == 2 else 0
        return torch.nn.functional.pad(x, (0, missing), value=fill.get(name, 0)) if missing else x

    return {name: torch.cat([widened(name, part[name]) for part in parts]) for name in like}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("kind", "across"), [*((kind, False) for kind in KINDS), ("prefix_lm of two stacks", True)])
def test_a_batch_is_what_its_objective_says(config, kind, across):
    """`plan` counts on it without reading data."""
    given = config(kind, f"data.cross_document_attention={str(across).lower()}")
    said, (batch, _) = given.objective.batch_shapes(given, 3), next(DataModule(given).first(3))
    del batch["sample_index"]
    assert {name: x.is_floating_point() for name, x in batch.items()} == {name: name == "pixel_values" for name in said}
    sizes = {name: tuple(x.shape) for name, x in batch.items()}
    if given.data.sample_kind not in ("pairs", "labels"):  # padded only to the longest of a batch
        assert sizes == said
    assert all(a <= b for name, size in sizes.items() for a, b in zip(size, said[name], strict=True)), (sizes, said)


@pytest.mark.parametrize("kind", some(KINDS, ("masked_lm with pairs", "span_corruption", "seq2seq", "dpo", "image_classification")))
def test_batches_do_not_depend_on_workers_processes_micro_batches_or_the_start(kind, config):
    base = config(kind)
    plain = batches(base, 4)
    for other in (dc.replace(base.data, num_workers=2), dc.replace(base.data, micro_batch_size=2)):
        assert all(map(same, batches(dc.replace(base, data=other), 4), plain))
    for a, b in zip(batches(base, 2, start=2), plain[2:], strict=True):
        assert same(a, b)
    for world_size in (2, 4):
        shares = [batches(base, 3, rank=(r, world_size)) for r in range(world_size)]
        for parts, whole in zip(zip(*shares, strict=True), plain, strict=False):
            assert same(joined(list(parts), whole), whole)


@EVERY
def test_every_reading_of_a_sample_is_another_one_and_every_validation_the_same(kind, config):
    base = config(kind)
    module = DataModule(base)
    first = list(module.val_dataloader())
    assert all(map(same, module.val_dataloader(), first))
    assert all(map(same, DataModule(base).val_dataloader(), first))
    if kind in ("seq2seq", "sft", "dpo", "classification"):
        return  # nothing in it is drawn
    n = module.n_train
    rows = module._train
    index = torch.arange(4).numpy()
    (a, b) = (rows.batch(index, Draws(base.seed, "train", index + n * e)) for e in (0, 1))
    assert not same(a, b), "the next epoch draws anew"


@EVERY
def test_losses_and_gradients_do_not_depend_on_the_micro_batch(kind, config):
    base = config(kind)
    module = LitModule(base)
    module.configure_model()
    model, objective = module.model.train(), module.objective
    (batch,) = batches(base, 1)
    n = objective.denominators(batch)
    results = []
    for size in (8, 3):
        model.zero_grad()
        total = 0.0
        for part in cut(batch, size):
            loss = objective.total(objective(model, part, n))
            loss.backward()
            total += float(loss.detach())
        results.append((total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (one, gradient), (other, other_gradient) = results
    assert math.isfinite(one)
    assert other == pytest.approx(one, rel=1e-5)
    assert torch.allclose(gradient, other_gradient, rtol=1e-3, atol=1e-5), float((gradient - other_gradient).abs().max())


@pytest.mark.parametrize("kind", ["masked_lm", "classification", "image_classification"])
def test_the_balance_of_experts_weighs_the_same_in_any_micro_batch(kind, config):
    """Each micro-batch is evened out by itself: so that all are alike, one row is repeated."""
    base = config(kind, "model/ffn=moe_softmax", "model.ffn.aux_weight=1", "model.ffn.dropout=0")
    module = LitModule(base)
    module.configure_model()
    model, objective = module.model.train(), module.objective
    (batch,) = batches(base, 1)
    row = {name: value[:1].expand(8, *value.shape[1:]) for name, value in batch.items()}
    whole, fours, ones = (gradients_of(objective, model, row, size) for size in (8, 4, 1))
    for part in (fours, ones):
        assert torch.allclose(part, whole, rtol=1e-3, atol=1e-5), float((part - whole).abs().max())


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_rotations_by_length_do_not_see_the_padding_of_a_batch(kind, config):
    """What no trained token attends to needs no mask, but would count."""
    rope = "model/position=rope", "model.position.scaling.rope_type=dynamic", "model.position.scaling.factor=4"
    base = config(kind, *rope)
    module = LitModule(dc.replace(base, model=dc.replace(base.model, max_seq_len=4)))
    module.configure_model()
    model, objective = shake(module.model.double()).eval(), module.objective
    (batch,) = batches(base, 1)
    fill = {"labels": -100, "document_ids": batch["document_ids"].max()}
    wider = {name: torch.nn.functional.pad(x, (0, 60), value=fill.get(name, 0)) for name, x in batch.items()}
    found = [objective.plain(model, given, objective.denominators(given))["loss"] for given in (batch, wider)]
    assert found[1].item() == pytest.approx(found[0].item(), rel=1e-6)


class OfLogits(PrefixLM):
    def __call__(self, model, batch, denominators):
        log_p = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        labels = batch["labels"][:, 1:]
        chosen = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return {"loss": -chosen[labels != -100].sum() / denominators["loss"]}


class OfLogProbs(PrefixLM):
    weights: ClassVar = {"loss": 0.5, "again": 0.5}

    def denominators(self, batch):
        return super().denominators(batch) | {"again": torch.tensor(1.0)}

    def __call__(self, model, batch, denominators):
        log_p = model(input_ids=batch["input_ids"], labels=batch["labels"], return_logits=False, return_log_probs=True).log_probs
        return {"again": -log_p.sum() / denominators["loss"], "loss": -log_p.sum() / denominators["loss"]}


class OfLoss(PrefixLM):
    def __call__(self, model, batch, denominators):
        n = denominators["loss"]
        return {"loss": model(input_ids=batch["input_ids"], labels=batch["labels"], num_items_in_batch=n).loss}


@pytest.mark.parametrize("own", [OfLogits, OfLogProbs])
def test_a_loss_computed_outside_the_forward_weighs_the_balance_of_experts_as_one_within(own, config):
    base = config("prefix_lm", "model/ffn=moe_softmax", "model.ffn.aux_weight=1", "model.ffn.dropout=0")
    module = LitModule(base)
    module.configure_model()
    model = module.model.double().train()
    (batch,) = batches(base, 1)
    expected = gradients_of(OfLoss(), model, batch, 3)
    assert (gradients_of(own(), model, batch, 3) - expected).abs().max() < 1e-6 * expected.abs().max()
    blank = dict(batch, labels=torch.full_like(batch["labels"], -100))
    assert (gradients_of(own(), model, blank, 3) == 0).all()


def gradients_of(objective, model, batch, size: int) -> torch.Tensor:
    """Of a batch in micro-batches, as a step has them, on two ranks."""
    model.zero_grad()
    counts = {name: n.clamp(min=1) for name, n in objective.denominators(batch).items()}
    for part in cut(batch, size):
        observed = Observed(model)
        (2 * observed.total(objective, objective(observed, part, counts), part, counts)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@EVERY
def test_a_step_without_targets_is_0(kind, config):
    base = config(kind)
    module = LitModule(base)
    (batch,) = batches(base, 1)
    if batch["labels"].ndim == 1:
        return  # every row has a class
    module.configure_model()
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    counts = module.objective.denominators(empty)
    terms = module.objective(module.model, empty, {name: n.clamp(min=1) for name, n in counts.items()})
    assert float(terms[next(iter(terms))]) == 0.0


@pytest.mark.parametrize("kind", some(KINDS, ("masked_lm with pairs", "seq2seq")))
def test_the_loss_falls_and_the_columns_are_told(kind, config, tmp_path):
    made = txtrain.train(config(kind, "trainer.max_steps=40", "trainer.val_check_interval=40", "trainer.overfit_batches=1", "save.every_n_steps=100"))
    with open(tmp_path / "run" / "metrics.csv") as f:
        rows = list(csv.DictReader(f))
    losses = [float(row["loss"]) for row in rows]
    assert losses[-1] < 0.8 * losses[0], losses[:: len(losses) - 1]
    module = LitModule(config(kind))
    for column in module.objective.columns:
        assert rows[-1][column], column
        assert math.isfinite(float(rows[-1][column]))
    assert made.metrics["val_loss"] > 0
    if "nsp_loss" in module.objective.columns:
        assert float(rows[-1]["loss"]) == pytest.approx(float(rows[-1]["mlm_loss"]) + float(rows[-1]["nsp_loss"]), rel=1e-6)


@EVERY
def test_throughput_counts_the_positions_that_a_batch_has(kind, config):
    base = config(kind)
    (batch,) = batches(base, 1)
    tokens, flops, again = RunCallback(base, SimpleNamespace(columns=()), *[None] * 7, (), b"")._work(LitModule(base), batch)
    n, (source, target) = len(batch["sample_index"]), base.lengths
    if kind == "seq2seq":  # pairs of 9 tokens at most, in batches of their own length
        source, target = batch["input_ids"].shape[1], batch["labels"].shape[1]
        assert max(source, target) <= 16 < base.seq_len
    elif kind == "prefix_lm of two stacks":
        source, target = source - 1, target - 1
    assert tokens == n * max(source, target or 0)
    assert flops == pytest.approx(n * base.model.flops_per_sample(source, target, base.objective.target_share), rel=1e-12)
    assert again == 0


@pytest.mark.parametrize("kind", some(KINDS, ("masked_lm with pairs", "span_corruption")))
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind, config, tmp_path):
    rows = {}
    for name, stops in (("whole", [12]), ("parts", [4, 7, 12])):
        for stop in stops:
            txtrain.train(config(kind, f"run_dir={tmp_path / name}", f"trainer.max_steps={stop}", "scheduler=constant"))
        with open(tmp_path / name / "metrics.csv") as f:
            rows[name] = [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in csv.DictReader(f)]
    trained = [row for row in rows["parts"] if row["val_loss"] == ""]
    assert trained == [row for row in rows["whole"] if row["step"] in {r["step"] for r in trained}]
    assert [row["loss"] for row in rows["parts"]] == [row["loss"] for row in rows["whole"]]
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


def test_gaps_are_filled_where_the_screen_shows_samples(config, tmp_path):
    shown = config("span_corruption", "trainer.max_steps=60", "trainer.val_check_interval=60", "sample.n=2", "sample.max_new_tokens=20", "sample.temperature=0")
    txtrain.train(shown)
    first, second = (tmp_path / "run" / "samples.txt").read_text().strip().split("\n\n")
    for text in (first, second):
        assert text.startswith("--- step 60\n")
        assert "«" in text, "after 60 steps an answer begins with the first gap's name"
        assert text.endswith("»"), "no more is shown than what was filled"


def test_prompts_of_spans_have_their_gaps_where_they_are_written(config, tmp_path):
    shown = config("span_corruption", "trainer.max_steps=2", "trainer.val_check_interval=2", 'sample.prompts=["The <extra_id_0> says <extra_id_1>."]')
    txtrain.train(shown)
    text = (tmp_path / "run" / "samples.txt").read_text()
    assert re.match(r"--- step 2\nThe («.*»|<extra_id_0>)", text, re.DOTALL)


def test_the_objectives_of_the_documentation_train(config, tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "objectives.md").read_text()
    log_probs, taught, focal = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(log_probs, said := {})
    assert said["answers"].shape == (2,)
    (tmp_path / "taught.py").write_text(taught)
    (tmp_path / "focal.py").write_text(focal)
    before = {axis: dict(options) for axis, options in TABLE.items()}
    given = ("trainer.max_steps=3", "data.cross_document_attention=true")
    try:
        made = config("prefix_lm", f"imports=[{tmp_path / 'focal.py'}]", "objective=focal", "objective.gamma=1.0", *given)
        one = txtrain.train(made)
        own = (f"run_dir={tmp_path / 'taught'}", f"objective.teacher={tmp_path / 'run'}")
        two = txtrain.train(config("prefix_lm", f"imports=[{tmp_path / 'taught.py'}]", "objective=taught", *own, *given))
    finally:
        for axis, options in before.items():
            TABLE[axis].clear()
            TABLE[axis].update(options)
    assert 0 < one.metrics["loss"] < 7
    assert 0 < two.metrics["loss"] < 7
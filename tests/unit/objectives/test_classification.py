"""objective=classification: scores of whole sets, the auxiliary loss, and metrics that no batch and no rank changes."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics

from tests.unit.data.test_labels import table
from txtrain import compose, load_pretrained, train
from txtrain.model.head.loss import class_loss
from txtrain.objectives.base import build_objective
from txtrain.objectives.scores import class_scores, flag_scores, number_scores
from txtrain.training.data_module import DataModule
from txtrain.training.module import LitModule

SHAPE = (
    "data=labels", "model.vocab_size=300", "model.max_seq_len=48", "data.seq_len=48", "data.tokenizer=bytes", "model.n_layers=2", "model.dim=32",
    "model.n_heads=2", "model.dropout=0", "trainer.accelerator=cpu", "data.val_fraction=0.3", "sample.n=0", "data.global_batch_size=8",
)


def run(tmp_path, *overrides):
    return compose([*SHAPE, f"data.path={table(tmp_path / 'a.csv')}", f"data.cache_dir={tmp_path / 'cache'}", *overrides])


def test_scores_are_those_of_scikit_learn_and_scipy():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 5, 200), rng.integers(0, 4, 200)
    scores = class_scores(found, truth)
    assert scores["accuracy"] == metrics.accuracy_score(truth, found)
    assert scores["f1_macro"] == metrics.f1_score(truth, found, average="macro", zero_division=0)
    assert scores["mcc"] == metrics.matthews_corrcoef(truth, found)
    flags = rng.integers(0, 2, (2, 50, 3))
    assert flag_scores(*flags)["accuracy"] == metrics.accuracy_score(flags[1], flags[0])
    numbers = np.round(rng.normal(size=(2, 80, 2)), 1)  # with ties
    scores = number_scores(*numbers)
    assert scores["pearson"] == pytest.approx(np.mean([stats.pearsonr(a, b)[0] for a, b in zip(*numbers.transpose(0, 2, 1), strict=True)]))
    assert scores["spearman"] == pytest.approx(np.mean([stats.spearmanr(a, b)[0] for a, b in zip(*numbers.transpose(0, 2, 1), strict=True)]))
    assert np.isnan(number_scores(np.ones((9, 1)), numbers[0, :9, :1])["pearson"])


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (("model=bert",), ("accuracy", "f1_macro", "f1_micro", "mcc")),
        (("model=t5", "data.kind=multi", "data.label_column=[funny,scary]"), ("accuracy", "f1_macro", "f1_micro")),
        (("model=gpt1", "data.kind=regression", "data.label_column=score", "model.head.lm=true"), ("pearson", "spearman")),
    ],
)
def test_micro_batches_change_neither_loss_nor_metrics(overrides, names, tmp_path):
    both = [
        train(run(tmp_path, *overrides, "trainer.max_steps=4", "trainer.val_check_interval=4", f"data.micro_batch_size={size}", f"run_dir={tmp_path / str(size)}")).metrics
        for size in (8, 2)
    ]
    assert set(names) <= both[0].keys()
    for name in ("loss", "val_loss", "grad_norm", *names):
        assert both[1][name] == pytest.approx(both[0][name], rel=1e-4), name


def test_the_auxiliary_loss_is_that_of_the_next_tokens(tmp_path):
    config = run(tmp_path, "model=gpt1", "model.head.lm=true", "model.head.n_classes=3", "objective.lm_weight=0.25")
    data = DataModule(config)
    batch, _ = next(data.first(8))
    objective, model = build_objective(data.config), LitModule(data.config)
    model.configure_model()
    counts = objective.denominators(batch)
    terms = objective(model.model, batch, counts)
    out = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits = out.last_hidden_state @ model.model.embedding.weight_VD.T
    targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(terms["lm_loss"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["loss"], class_loss("single", out.logits, batch["labels"], counts["loss"]))
    assert torch.equal(objective.total(terms), terms["loss"] + 0.25 * terms["lm_loss"])
    assert objective.reported(terms) is terms["loss"] or torch.equal(objective.reported(terms), terms["loss"])


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    given = ("model=gpt1", "model.head.lm=true", "optimizer.layer_decay=0.5", "trainer.val_check_interval=4", "trainer.log_every_n_steps=1", "save.every_n_steps=4")
    whole = train(run(tmp_path, *given, "trainer.max_steps=8", f"run_dir={tmp_path / 'whole'}"))
    for steps in (4, 8):
        parts = train(run(tmp_path, *given, f"trainer.max_steps={steps}", "scheduler=constant", f"run_dir={tmp_path / 'parts'}"))
    again = train(run(tmp_path, *given, "trainer.max_steps=8", "scheduler=constant", f"run_dir={tmp_path / 'at once'}"))
    for name in ("loss", "val_loss", "accuracy", "lm_loss", "grad_norm"):
        assert parts.metrics[name] == again.metrics[name], name
    assert whole.run_dir is not None
    assert load_pretrained(whole.run_dir).config.head.label_names == ("no", "perhaps", "yes")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "gemma2", "deepseek_r1", "transformer", "t5_v1_1", "mistral"])
def test_a_run_learns_its_labels_on_any_family(model, tmp_path):
    config = run(
        tmp_path, f"model={model}", "data.kind=multi", "data.label_column=[funny,scary]", "trainer.max_steps=40", "optimizer.lr=3e-3",
        "scheduler.warmup_steps=2", f"run_dir={tmp_path / 'run'}", "model.head.dropout=0",
    )
    found = train(config).metrics
    assert found["loss"] < 0.6931

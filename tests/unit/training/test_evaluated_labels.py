"""`evaluate` and `predict` of classifiers: the classes are the model's, and texts are read as in training."""

import csv
import json
import math

import numpy as np
import pytest
import torch

import txtrain
from tests.training import RUN
from txtrain import compose
from txtrain.cli.main import main
from txtrain.data.tokenizer.tokenizer import byte_tokenizer
from txtrain.objectives.base import ROWS
from txtrain.objectives.classification import Classification
from txtrain.registry import TABLE
from txtrain.training.evaluation import figures
from txtrain.training.run import train

SMALL = ("data=labels", "data.tokenizer=bytes", "model.vocab_size=300", "model.max_seq_len=64", "data.seq_len=64", "model.dim=32", "model.n_layers=1", "model.n_heads=2")
KINDS = {
    "single": ("model=bert", "data.text_pair_column=other", "data.label_column=mood"),
    "multi": ("model=gpt2", "data.kind=multi", "data.label_column=moods"),
    "regression": ("model=gpt2", "data.kind=regression", "data.label_column=number"),
}
MOODS = ("angry", "calm", "sad")


def rows_of(moods, n):
    return [
        {
            "text": f"A text with the number {i}", "other": f"which is {'long ' * (i % 4)}beside it", "mood": moods[i % len(moods)],
            "moods": [m for k, m in enumerate(MOODS) if i >> k & 1], "number": i / 10,
        }
        for i in range(n)
    ]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    write(folder / "train.jsonl", rows_of(MOODS, 48))
    write(folder / "held_out.jsonl", rows_of(MOODS, 13))
    write(folder / "sad.jsonl", rows_of(("sad",), 5))
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    made = {}

    def run(kind):
        if kind not in made:
            paths = [f"data.path={folder / 'train.jsonl'}", f"data.val_path={folder / 'held_out.jsonl'}", f"data.cache_dir={folder / 'cache'}"]
            # the validation is of all rows
            mine = [word for word in RUN if not word.startswith(("run_dir=", "trainer.limit_val"))]
            made[kind] = train(compose([*SMALL, *KINDS[kind], *paths, *mine, "trainer.max_steps=2", f"run_dir={folder / kind}"])).run_dir
        return made[kind]

    return run


def lines(folder, run, verb, out, *more):
    return [verb, f"checkpoint={run}", f"out={folder / out}", "trainer.accelerator=cpu", f"data.cache_dir={folder / 'cache'}", *more]


@pytest.mark.parametrize("n_numbers", [1, 2])
def test_numbers_to_learn_are_not_rounded_in_half_precision(tmp_path, monkeypatch, capsys, n_numbers):
    """Training, validation, metrics of one's own and `evaluate` read the file's, which bfloat16 cannot hold."""
    seen: dict[str, set[float]] = {"trained": set(), "measured": set()}

    @txtrain.component("metric", "labels")
    def labels(model, batch):
        seen["measured"] |= {*batch["labels"].flatten().tolist()}
        return batch["labels"].view(len(batch["labels"]), -1).double().sum(1)

    plain = Classification.denominators

    def spied(objective, batch):
        seen["trained"] |= {*batch["labels"].flatten().tolist()}
        return plain(objective, batch)

    monkeypatch.setattr(Classification, "denominators", spied)
    rows = [{"text": f"A text with the number {i}", "a": 1000 + i / 8, "b": -1000 - i / 8} for i in range(24)]
    file, columns = write(tmp_path / "train.jsonl", rows), "[a]" if n_numbers == 1 else "[a,b]"
    given = [*SMALL, "model=bert", "data.kind=regression", f"data.label_column={columns}", f"data.path={file}", *RUN, "trainer.max_steps=3"]
    given += [f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}", "trainer.precision=bf16-true", "metrics=[labels]"]
    try:
        run = train(compose(given)).run_dir
        assert main(lines(tmp_path, run, "evaluate", "figures.json", "metrics=[labels]")) == 0, capsys.readouterr().err
    finally:
        del TABLE["metric"]["labels"]
    exact = {row[name] for row in rows for name in ("a", "b")[:n_numbers]}
    assert all(found and found <= exact for found in seen.values()), seen


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_validation_whether_held_out_or_named(folder, runs, kind, capsys):
    run = runs(kind)
    with open(run / "metrics.csv", newline="") as f:
        last = list(csv.DictReader(f))[-1]
    columns = [word for word in KINDS[kind] if "column" in word]
    for name, words in (("own", []), ("named", ["data=labels", f"data.path={folder / 'held_out.jsonl'}", *columns, "data.micro_batch_size=2"])):
        assert main(lines(folder, run, "evaluate", f"{kind}_{name}.json", *words)) == 0, capsys.readouterr().err
        found = json.loads((folder / f"{kind}_{name}.json").read_text())
        assert found["objective"] == "classification"
        assert found["metrics"]["loss"]["n"] == 13
        for metric, one in found["metrics"].items():
            wanted = float(last["val_loss" if metric == "loss" else metric])
            assert one["value"] == pytest.approx(wanted, rel=1e-5, abs=1e-6), metric
            assert one["low"] is None or one["low"] - 1e-9 <= one["high"]


def test_a_correlation_with_a_constant_has_no_interval(recwarn):
    """A model that says one number for all: neither a warning of NumPy, nor ends of nan."""
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    found = figures(Classification("regression"), {"loss": np.ones((3, 2)), ROWS: rows}, 20, 0)
    assert math.isnan(found["pearson"].value)
    assert (found["pearson"].low, found["spearman"].high) == (None, None)
    assert not recwarn.list


def test_rows_without_some_classes_have_the_models_numbers(folder, runs, capsys):
    """All rows are of the last class; by their own names it would be the first."""
    run, words = runs("single"), ["data=labels", f"data.path={folder / 'sad.jsonl'}", "data.text_pair_column=other", "data.label_column=mood"]
    assert main(lines(folder, run, "evaluate", "sad.json", *words)) == 0, capsys.readouterr().err
    assert main(lines(folder, run, "predict", "sad.jsonl.jsonl", *words)) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (folder / "sad.jsonl.jsonl").read_text().splitlines()]
    by_hand = sum(-math.log(row["probabilities"]["sad"]) for row in rows) / len(rows)
    assert json.loads((folder / "sad.json").read_text())["metrics"]["loss"]["value"] == pytest.approx(by_hand, rel=1e-5)


def test_labels_have_the_models_names_and_pairs_are_read_as_pairs(folder, runs, capsys):
    run, rows = runs("single"), rows_of(MOODS, 13)
    words = ["data=labels", f"data.path={folder / 'held_out.jsonl'}", "data.text_pair_column=other", "data.label_column=mood"]
    assert main(lines(folder, run, "predict", "pairs.jsonl", *words, "data.micro_batch_size=4")) == 0, capsys.readouterr().err
    found = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    tokenizer = byte_tokenizer().with_specials(["[CLS]", "[SEP]"])
    begin, end = tokenizer.id_of("[CLS]"), tokenizer.id_of("[SEP]")
    model = txtrain.load_pretrained(run)
    for row, one in zip(rows, found, strict=True):
        first, second = [begin, *tokenizer.encode(row["text"]), end], [*tokenizer.encode(row["other"]), end]
        ids, types = torch.tensor([first + second])[:, :64], torch.tensor([[0] * len(first) + [1] * len(second)])[:, :64]
        if len(first + second) > 64:
            continue  # cut at the longer text: tests/unit/data has that
        with torch.no_grad():
            wanted = model(input_ids=ids, token_type_ids=types).logits[0].softmax(-1)
        assert list(one["probabilities"]) == list(MOODS)
        assert list(one["probabilities"].values()) == pytest.approx(wanted.tolist(), abs=1e-5)
        assert one["label"] == MOODS[int(wanted.argmax())]


def test_several_classes_and_numbers_are_told_as_such(folder, runs, capsys):
    rows = ["data=text", f"data.path={folder / 'held_out.jsonl'}"]  # without any label
    for kind in ("multi", "regression"):
        assert main(lines(folder, runs(kind), "predict", f"{kind}.jsonl", *rows)) == 0, capsys.readouterr().err
        found = [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]
        assert len(found) == 13
        for one in found:
            if kind == "multi":
                assert one["label"] == [name for name in MOODS if one["probabilities"][name] > 0.5]
            else:
                assert set(one) == {"index", "label"}
                assert isinstance(one["label"], float)


def test_another_kind_of_label_is_refused(folder, runs, capsys):
    words = ["data=labels", f"data.path={folder / 'held_out.jsonl'}", "data.label_column=number", "data.kind=regression"]
    for verb in ("evaluate", "predict"):
        assert main(lines(folder, runs("multi"), verb, "refused.json", *words)) == 2
        assert "`data.kind` must be multi, as in the checkpoint" in capsys.readouterr().err

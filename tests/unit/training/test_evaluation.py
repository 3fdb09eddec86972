"""`txtrain evaluate`: figures equal transformers', and themselves on any batch size; intervals; what is refused."""

import dataclasses as dc
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch

import txtrain
from tests.training import tiny
from txtrain import compose
from txtrain.cli.main import main
from txtrain.config.schema_of_trained import Evaluate
from txtrain.errors import ConfigError
from txtrain.objectives.base import ROWS, Objective, build_objective
from txtrain.parallel.one_process import OneProcess
from txtrain.training.evaluation import HISTORY, Reader, figures
from txtrain.training.run import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluated")


@pytest.fixture(scope="module")
def run(folder):
    return train(tiny(folder, f"run_dir={folder / 'run'}", "trainer.max_steps=3")).run_dir


@pytest.fixture(scope="module")
def documents(folder):
    """Forty short documents."""
    file = folder / "held_out.jsonl"
    file.write_text("".join(json.dumps({"text": f"Line {i} has {i * i} in it, {'and more ' * (i % 9)}."}) + "\n" for i in range(40)))
    return file


def lines(folder, *more):
    return ["trainer.accelerator=cpu", f"data.cache_dir={folder / 'cache'}", *more]


def evaluate(folder, where, documents, *more):
    cfg = compose(lines(folder, "data=text", f"data.path={documents}", *more), verb="evaluate")
    return txtrain.evaluate(where, cfg)


def values(made):
    return {name: one.value for name, one in made.metrics.items()}


def test_memory_does_not_grow_with_the_numbers_of_documents():
    """A file says them."""
    reader = Reader(None, None, OneProcess(compose([])), torch.device("cpu"), None, None, 1)
    parts = [(np.array([2**40, 3]), np.array([[1.0], [2.0]])), (np.array([2**40, 5]), np.array([[4.0], [0.0]]))]
    assert reader._gathered({"loss": parts})["loss"].tolist() == [[2.0], [5.0]]


def test_figures_equal_transformers_on_the_same_weights_and_text(folder, run, documents):
    """A window of 16 over the stream of all documents, 6 tokens further each time, by the loop of transformers' guide."""
    exported = folder / "exported"
    assert main(["export", f"checkpoint={run}", f"out={exported}"]) == 0
    from transformers import AutoModelForCausalLM

    made = evaluate(folder, exported, documents, "stride=6", "data.seq_len=16", "data.cross_document_attention=true", "data.tokenizer=bytes")
    theirs = AutoModelForCausalLM.from_pretrained(exported).eval()
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    from txtrain.data.tokenizer.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    ids = torch.tensor([i for text in texts for i in [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]])
    total, n, end = 0.0, 0, 0
    for begin in range(0, len(ids), 6):
        window = ids[begin : begin + 16]
        labels = window.clone()
        labels[: end - begin] = -100
        end = begin + len(window)
        with torch.no_grad():
            logits = theirs(window[None]).logits[0].double()
        kept = labels[1:] != -100
        total += torch.nn.functional.cross_entropy(logits[:-1][kept], labels[1:][kept], reduction="sum").item()
        n += int(kept.sum())
        if end == len(ids):
            break
    assert n == len(ids) - 1, "each token once"
    assert made.metrics["loss"].value == pytest.approx(total / n, abs=1e-6)
    assert made.metrics["perplexity"].value == pytest.approx(math.exp(total / n), rel=1e-6)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert made.metrics["bits_per_byte"].value == pytest.approx(total / math.log(2) / n_bytes, rel=1e-6)


def test_figures_are_those_of_validation_and_of_any_batch_size(folder, run, documents, capsys):
    first = evaluate(folder, run, documents)
    assert first.metrics["loss"].n == 40, "documents"
    assert first.metrics["loss"].low < first.metrics["loss"].value < first.metrics["loss"].high
    for size in (1, 3, 16):
        again = evaluate(folder, run, documents, f"data.micro_batch_size={size}")
        assert values(again) == pytest.approx(values(first), abs=1e-7)
    loaded = txtrain.load_pretrained(run)
    assert values(evaluate(folder, loaded, documents, "data.tokenizer=bytes")) == pytest.approx(values(first), abs=1e-9)
    assert not loaded.training
    packed = [evaluate(folder, run, documents, f"data.packing={packing}", "data.seq_len=128") for packing in ("best_fit", "none")]
    assert values(packed[0]) == pytest.approx(values(packed[1]), abs=1e-6), "padding changes nothing"
    cut = [evaluate(folder, run, documents, f"data.packing={packing}", "data.seq_len=24") for packing in ("best_fit", "none")]
    assert values(cut[0]) == pytest.approx(values(cut[1]), abs=1e-6), "each token but a document's first is predicted once"


def test_a_run_alone_is_evaluated_on_what_it_held_out(folder, run, capsys):
    assert main(["evaluate", f"checkpoint={run}", *lines(folder, f"out={folder / 'evaluation.json'}")]) == 0
    said = capsys.readouterr().out
    assert "loss" in said
    assert "perplexity" in said
    assert "95 %" in said
    written = json.loads((folder / "evaluation.json").read_text())
    assert set(written["metrics"]["loss"]) == {"value", "low", "high", "n"}
    assert (written["split"], written["step"]) == ("validation", 3)
    assert json.loads((run / HISTORY).read_text().splitlines()[-1])["metrics"] == written["metrics"]
    cfg = compose(lines(folder, f"checkpoint={run}", "data.global_batch_size=5"), verb="evaluate")
    assert cfg.data.seq_len is None
    assert cfg.data.type == "text"
    assert cfg.model.dim == 32
    full = train(tiny(folder, f"run_dir={folder / 'again'}", "trainer.max_steps=3", "trainer.limit_val_batches=1000"))
    rest = written["metrics"]["loss"]["value"] - full.metrics["val_loss"]
    assert abs(rest) < 0.01, f"validation leaves out the last, shorter sequence alone: {rest}"


def test_the_cache_is_not_where_a_strangers_run_says(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TXTRAIN_CACHE", str(tmp_path / "mine"))
    there = (f"run_dir={tmp_path / 'run'}", "trainer.max_steps=1", f"data.cache_dir={tmp_path / 'elsewhere'}")
    train(tiny(folder, *there))
    shutil.rmtree(tmp_path / "elsewhere")
    assert main(["evaluate", f"checkpoint={tmp_path / 'run'}", "trainer.accelerator=cpu", "n_bootstrap=0"]) == 0
    assert "data.cache_dir is not taken" in capsys.readouterr().err
    assert (tmp_path / "mine").exists()
    assert not (tmp_path / "elsewhere").exists()
    cfg = compose(lines(folder, f"checkpoint={tmp_path / 'run'}"), verb="evaluate")
    assert cfg.data.cache_dir == str(folder / "cache")


def test_figures_are_printed_where_the_run_cannot_keep_them_and_a_pipe_is_not_waited_for(folder, run, capsys, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    history = tmp_path / "run" / HISTORY
    history.unlink(missing_ok=True)
    given = ["evaluate", f"checkpoint={tmp_path / 'run'}", *lines(folder)]
    history.mkdir()
    assert main(given) == 0
    said = capsys.readouterr()
    assert "perplexity" in said.out
    assert f"{history} cannot be written" in said.err
    history.rmdir()
    os.mkfifo(history)
    assert main(given) == 2
    assert f"{history} must be a regular file" in capsys.readouterr().err


def test_a_path_alone_is_read_as_the_run_reads_its_own(folder, run, documents):
    cfg = compose(lines(folder, f"checkpoint={run}", f"data.path={documents}"), verb="evaluate")
    assert (cfg.data.type, cfg.data.path, cfg.split) == ("text", str(documents), "all")
    named = compose(lines(folder, f"init_from={run}", "data=text", f"data.path={documents}", f"data.val_path={documents}"), verb="evaluate")
    assert (named.checkpoint, named.split) == (str(run), "validation")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data=text"], "data.path"),
        (["data=digits"], "`data=digits` must be data for this model, a decoder with model/head=lm, but is images instead. It is evaluated on "),
        (["data=preferences", "data.path={documents}"], "wikitext"),
        (["trainer.limit_val_batches=2"], "`trainer.limit_val_batches` must not be given here: nothing here reads it."),
        (["optimizer=lion"], "`optimizer` must not be given here"),
        (["model.dim=8"], "`model.dim` must not be given here: it comes with the weights."),
        (["run_dir=elsewhere"], "`run_dir` must not be given here: nothing here reads it."),
        (["name=mine", "logger=wandb"], "`logger` must not be given here: nothing here reads it."),
        (["callbacks=none"], "`callbacks` must not be given here"),
        (["init_from={run}"], "`init_from` must be null with checkpoint="),
        (["resume=elsewhere"], "`resume` must not be given here"),
        (["recipe=gpt2_python_docs"], "`recipes` must not be given here"),
        (["trainer.compile=true"], "`trainer.compile` must not be given here"),
        (["data=text", "data.path={documents}", "stride=32"], "`stride` must be at most 31"),
        (["data=text", "data.path={documents}", "stride=4", "data.packing=none"], "`stride` must be null"),
        (["data=text", "data.path={documents}", "out=x.txt"], "`out` must be a .json file"),
        (["data=text", "data.path={documents}", "objective=masked_lm"], "objective"),
        (["data.columns=[0,1]"], "columns"),
        (["lm_eval.limit=3"], "`tasks` must be given with lm_eval.include_path"),
        (["tasks=[mine]", "stride=4"], "`stride` must not be given with tasks"),
    ],
)
def test_mistakes_are_refused_before_anything_is_read(folder, run, documents, words, says, capsys):
    given = [word.format(documents=documents, run=run) for word in words]
    assert main(["evaluate", f"checkpoint={run}", *lines(folder, *given)]) == 2
    said = capsys.readouterr().err
    assert says in said, said


def test_a_folder_of_tasks_that_is_none_is_named(run, capsys):
    assert main(["evaluate", f"checkpoint={run}", "tasks=[mine]", "lm_eval.include_path=nowhere"]) == 2
    assert "`lm_eval.include_path` must be a folder with tasks, but 'nowhere' is none." in capsys.readouterr().err


def test_tasks_are_evaluated_once_however_many_gpus_there_are(run, tmp_path, monkeypatch, capsys):
    """trainer.devices=auto is one process then; of a launcher's several none evaluates."""
    ours = shutil.copytree(run, tmp_path / "run")
    monkeypatch.setattr("txtrain.parallel.launch._n_gpus", lambda accelerator: 2)
    monkeypatch.setattr("txtrain.training.harness.of_tasks", lambda cfg, tokenizer: {"acc/mine": (0.5, None, None, 4)})
    monkeypatch.setattr("txtrain.cli.evaluate.launch", lambda *_, **__: pytest.fail("processes are started"))
    words = ["evaluate", f"checkpoint={ours}", "tasks=[mine]", "trainer.devices=auto"]
    assert main(words) == 0
    assert (ours / "evaluations.jsonl").read_text().count('"tasks": ["mine"]') == 1
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert main(words) == 2
    assert "`tasks` must be evaluated by one process: trainer.devices=1." in capsys.readouterr().err


def test_a_checkpoint_is_asked_for(capsys):
    assert main(["evaluate", "data=python_docs"]) == 2
    assert "`checkpoint` must be given" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- objectives

KINDS = {
    "masked_lm": ("model=bert", "model.dim=32", "model.n_layers=1", "model.n_heads=2", "model.vocab_size=300", "model.max_seq_len=32", "data=text", "data.tokenizer=bytes"),
    "masked_lm, words": (
        "model=bert", "model.dim=32", "model.n_layers=1", "model.n_heads=2", "model.vocab_size=300", "model.max_seq_len=32",
        "model.head.next_sentence=false", "data=text", "data.tokenizer=bytes",
    ),
    "span_corruption": ("model=t5", "model.dim=32", "model.n_layers=1", "model.n_heads=2", "model.vocab_size=400", "model.max_seq_len=32", "data=text", "data.tokenizer=bytes"),
    "seq2seq": ("model=transformer", "model.dim=32", "model.n_layers=1", "model.n_heads=2", "data=reverse", "data.n_pairs=100", "objective.n_decoded=0"),
    "image_classification": ("model=vit", "model.dim=32", "model.n_layers=1", "model.n_heads=2", "data=digits"),
    "causal_lm": ("model=gpt2", "model.dim=32", "model.n_layers=1", "model.n_heads=2", "model.vocab_size=300", "model.max_seq_len=32", "data=text", "data.tokenizer=bytes"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_sums_of_samples_are_those_of_validation(folder, documents, kind):
    """What `measure` gives for each sample adds up to what `validate` gives for the batch, for every objective."""
    path = [f"data.path={documents}", "data.val_fraction=0.4"] if "data=text" in KINDS[kind] else []
    cfg = compose([*KINDS[kind], *path, f"data.cache_dir={folder / 'cache'}", "trainer.accelerator=cpu"])
    objective = build_objective(cfg)
    data = txtrain.DataModule(cfg, objective=objective)
    batch = next(data.examples(6, 6))
    torch.manual_seed(0)
    model = txtrain.build_model(cfg.model).eval()
    sizes = None if data.token_bytes is None else torch.as_tensor(data.token_bytes)
    with torch.no_grad():
        wanted, made = objective.validate(model, batch), objective.measure(model, batch, sizes)
    assert set(wanted) <= set(made)
    for name, (value, count) in wanted.items():
        each = made[name].flatten(1, -2).sum(1) if made[name].ndim == 3 else made[name]
        assert each.shape == (6, 2)
        assert each.sum(0).tolist() == pytest.approx([float(value), float(count)], rel=1e-5), name
    one_by_one = Objective.measure(objective, model, batch, sizes)
    for name, table in one_by_one.items():
        each = made[name].sum(1) if made[name].ndim == 3 else made[name]
        torch.testing.assert_close(each, table, rtol=1e-5, atol=1e-5)


def test_scores_of_texts_are_sacrebleus(folder):
    import sacrebleu

    from txtrain.data.tokenizer.tokenizer import byte_tokenizer
    from txtrain.objectives.score_sums import STATISTICS, with_scores

    tokenizer = byte_tokenizer()
    pairs = [("The cat sat on the mat.", "The cat sat on a mat."), ("Nothing alike", "here at all"), ("the same words again", "the same words again")]
    answers, references = ([tokenizer.encode(pair[i]) for pair in pairs] for i in (0, 1))
    tables = {name: of(answers, references, tokenizer).numpy() for name, of in STATISTICS.items()}
    found = with_scores({}, {name: table.sum(0) for name, table in tables.items()})
    said, wanted = zip(*pairs, strict=True)
    for name, of in (("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)):
        assert float(found[name]) == pytest.approx(of(said, [wanted]).score), name
    several = with_scores({}, {name: np.stack([table.sum(0), table[0]]) for name, table in tables.items()})
    assert several["bleu"].shape == (2,)
    assert several["bleu"][1] != several["bleu"][0]
    assert tables["exact_match"].sum(0).tolist() == [1.0, 3.0]


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 200 draws of 60 documents with unlike lengths, about 95 % of the intervals hold the mean over all tokens."""
    rng, held = np.random.default_rng(0), 0
    objective = Objective()
    for seed in range(200):
        n = rng.integers(5, 50, 60).astype(float)
        sums = n * (2.0 + rng.normal(0, 0.5, 60))
        one = figures(objective, {"loss": np.stack([sums, n], 1)}, 400, seed)["loss"]
        held += one.low <= 2.0 <= one.high
    assert 0.90 <= held / 200 <= 0.985, held
    again = figures(objective, {"loss": np.stack([sums, n], 1)}, 400, seed)["loss"]
    assert again == one, "seeded"
    assert figures(objective, {"loss": np.stack([sums, n], 1)}, 0, 0)["loss"].low is None
    many = figures(objective, {"loss": np.ones((20_000, 2))}, 50, 0)["loss"]
    assert (many.value, many.low, many.high, many.n) == (1.0, 1.0, 1.0, 20_000)


def test_metrics_of_whole_sets_are_scored_of_rows_and_resampled(folder):
    """An objective that gives ROWS: its `score` of all rows, and of resampled ones."""

    class Rows(Objective):
        def validate(self, model, batch):
            return {"loss": (batch["x"].sum(), torch.tensor(len(batch["x"]))), ROWS: (torch.stack([batch["x"], 2 * batch["x"]], 1), torch.tensor(1))}

        def score(self, rows):
            return {"median": float(np.median(rows[:, 1]))}

    objective = Rows()
    x = torch.arange(1.0, 42.0)
    made = objective.measure(None, {"x": x}, None)
    assert made[ROWS].tolist() == torch.stack([x, 2 * x], 1).tolist()
    found = figures(objective, {name: table.numpy() for name, table in made.items()}, 300, 0)
    assert (found["median"].value, found["median"].n, found["loss"].value) == (42.0, 41, 21.0)
    assert found["median"].low < 42 < found["median"].high


def test_evaluate_is_composed_as_a_train(folder, documents):
    cfg = compose(lines(folder, "data=text", f"data.path={documents}"), verb="evaluate")
    assert isinstance(cfg, Evaluate)
    assert cfg.split is None
    with pytest.raises(ConfigError, match="model"):
        txtrain.evaluate(torch.nn.Linear(1, 1), dc.replace(cfg))  # type: ignore[arg-type]

"""What validation evaluates beside the loss, what the best checkpoint is, and when a run ends early."""

import json

import pytest
import torch

import txtrain
from tests.training import tiny
from tests.unit.training.test_run import Interrupt
from txtrain import compose
from txtrain.checkpoint import format as checkpoint
from txtrain.cli.main import main
from txtrain.config.plugins import component
from txtrain.errors import ConfigError
from txtrain.monitor.metrics_csv import read
from txtrain.registry import TABLE
from txtrain.run_config import direction_of
from txtrain.training.run import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"The {i}th line says that {i} times 2 is", "choices": [str(2 * i), "zzz"], "answer": 0} for i in range(9)]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "other.jsonl").write_text("".join(json.dumps({"text": f"Another text, of number {i}."}) + "\n" for i in range(30)))
    return folder


def tasks(folder):
    return [
        "eval_tasks.choice.type=multiple_choice", f"eval_tasks.choice.path={folder / 'choices.jsonl'}",
        "eval_tasks.other.type=text", f"eval_tasks.other.path={folder / 'other.jsonl'}",
    ]


@pytest.fixture(scope="module")
def run(folder):
    """Twelve steps, validated at 5, 10 and 12; the tasks at 10 and 12."""
    words = [*tasks(folder), "trainer.eval_tasks_interval=10", "save.metric=accuracy_per_token/choice", "save.keep_last=1", "save.every_n_steps=100"]
    return train(tiny(folder, f"run_dir={folder / 'run'}", *words))


@pytest.fixture(scope="module")
def plain(folder):
    """The same steps without tasks."""
    return train(tiny(folder, f"run_dir={folder / 'plain'}"))


def column(run_dir, name):
    return [(int(row["step"]), row[name]) for row in read(run_dir / "metrics.csv") if row[name]]


def test_named_sets_are_evaluated_at_their_interval_as_evaluate_would(folder, run, plain):
    found = column(run.run_dir, "loss/other")
    assert [step for step, _ in found] == [10, 12]
    assert [step for step, _ in column(run.run_dir, "val_loss")] == [5, 10, 12]
    cfg = compose(["data=text", f"data.path={folder / 'other.jsonl'}", "trainer.accelerator=cpu", f"data.cache_dir={folder / 'cache'}"], verb="evaluate")
    made = txtrain.evaluate(run.run_dir, cfg)
    assert float(found[-1][1]) == pytest.approx(made.metrics["loss"].value, abs=1e-6)
    assert float(column(run.run_dir, "bits_per_byte/other")[-1][1]) == pytest.approx(made.metrics["bits_per_byte"].value, rel=1e-6)
    assert len(column(run.run_dir, "accuracy/choice")) == 2
    assert column(plain.run_dir, "loss") == column(run.run_dir, "loss"), "evaluating changes no step"


def test_any_column_decides_which_checkpoint_is_best(folder, run):
    kept = checkpoint.complete(run.run_dir)
    by_step = {step: float(value) for step, value in column(run.run_dir, "accuracy_per_token/choice")}
    best = min(step for step, value in by_step.items() if value == max(by_step.values()))
    assert {checkpoint.step_of(path) for path in kept} == {best, 12}
    assert checkpoint.read_state(kept[-1]).metrics["accuracy_per_token/choice"] == by_step[12]


def test_a_run_ends_when_its_metric_no_longer_gains_and_goes_on_counting_after_a_resume(folder, capsys):
    words = ["trainer.val_check_interval=1", "trainer.stop_after.patience=3", "trainer.stop_after.metric=perplexity", "trainer.stop_after.min_gain=1e6"]
    made = train(tiny(folder, f"run_dir={folder / 'early'}", *words))
    assert (made.status, int(made.metrics["step"])) == ("complete", 4), "the first value is the best, three are no gain"
    assert "no gain over perplexity" in capsys.readouterr().out
    assert checkpoint.read_state(checkpoint.complete(made.run_dir)[-1]).stopping[1] == 3
    again = train(tiny(folder, f"run_dir={folder / 'early'}", *words))
    assert int(again.metrics["step"]) == 4, "nothing is left to do"
    first = train(tiny(folder, f"run_dir={folder / 'parts'}", *words, "trainer.max_steps=2"))
    assert int(first.metrics["step"]) == 2
    assert int(train(tiny(folder, f"run_dir={folder / 'parts'}", *words)).metrics["step"]) == 4


def test_the_best_weights_are_loaded_at_the_end(folder):
    """At a rate that ruins the model, the last is not the best."""
    words = ["trainer.val_check_interval=2", "save.load_best=true", "optimizer.lr=3", "scheduler.warmup_steps=6", "trainer.max_steps=8"]
    cfg = tiny(folder, f"run_dir={folder / 'best'}", *words)
    torch.manual_seed(0)
    model = txtrain.build_model(cfg.model)
    made = train(cfg, model=model)
    losses = {step: float(value) for step, value in column(made.run_dir, "val_loss")}
    best = min(losses, key=losses.get)
    assert best != 8
    saved = txtrain.load_pretrained(checkpoint.path_of(made.run_dir, best)).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, saved[name], rtol=0, atol=0)


def test_they_are_loaded_if_an_interrupt_had_cut_the_last_validation_short(folder, capsys):
    """The run goes on with that validation, and trains no step."""
    words = ["trainer.val_check_interval=2", "save.load_best=true", "optimizer.lr=3", "scheduler.warmup_steps=4", "trainer.max_steps=4"]
    cfg = tiny(folder, f"run_dir={folder / 'cut'}", *words)
    assert train(cfg, callbacks=[Interrupt("on_validation_batch_start", step=4)]).status == "preempted"
    torch.manual_seed(0)
    model = txtrain.build_model(cfg.model)
    made = train(cfg, model=model)
    best = txtrain.load_pretrained(checkpoint.path_of(made.run_dir, 2)).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, best[name], rtol=0, atol=0)
    assert capsys.readouterr().out.count("weights of step 2, the best") == 1


def test_the_last_checkpoint_may_hold_weights_alone(folder, plain, capsys):
    words = [f"run_dir={folder / 'alone'}", "save.weights_only_last=true", "save.keep_last=1", "save.keep_best=0"]
    made = train(tiny(folder, *words))
    (last,) = checkpoint.complete(made.run_dir)
    names = {name.partition(".")[0] for name in checkpoint.shapes(last)}
    assert names == {"model"}
    whole = txtrain.load_pretrained(plain.run_dir).state_dict()
    for name, value in txtrain.load_pretrained(made.run_dir).state_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=0)
    assert int(train(tiny(folder, *words)).metrics["step"]) == 12, "nothing left to do"
    with pytest.raises(ConfigError, match="holds weights alone"):
        train(tiny(folder, *words, "trainer.max_steps=20"))


@pytest.fixture
def own():
    @component("metric", "first_byte")
    def first_byte(model, batch):
        """The share of rows whose likeliest second token is right, and a number of positions."""
        logits = model(input_ids=batch["input_ids"]).logits
        return logits[:, 0].argmax(-1) == batch["input_ids"][:, 1], torch.ones(len(logits))

    yield
    del TABLE["metric"]["first_byte"]


def test_a_function_of_ones_own_is_a_metric_of_validation_and_evaluate(folder, own):
    made = train(tiny(folder, f"run_dir={folder / 'own'}", "metrics=[first_byte]", "save.metric=first_byte", "save.direction=max", "trainer.max_steps=5"))
    (_, value), = column(made.run_dir, "first_byte")
    assert 0 <= float(value) <= 1
    cfg = compose(["metrics=[first_byte]", f"checkpoint={made.run_dir}", "trainer.accelerator=cpu"], verb="evaluate")
    assert txtrain.evaluate(made.run_dir, cfg).metrics["first_byte"].low is not None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["save.metric=val_los"], "save.direction"),
        (["save.metric=val_accuracy", "save.direction=max"], "`save.metric` must be a column"),
        (["save.metric=mine"], "`save.direction` must be given for mine, min or max"),
        (["trainer.stop_after.patience=2", "trainer.stop_after.metric=accuracy/choise"], "Did you mean accuracy/choice"),
        (["trainer.eval_tasks_interval=7"], "Nearest: 5"),
        (["eval_tasks.x.type=digits"], "eval_tasks.x"),
        (["eval_tasks.x.type=txt"], "eval_tasks.x"),
        (["metrics=[nothing]"], "`metrics` must be of"),
        (["save.load_best=true", "save.keep_best=0"], "`save.keep_best` must be at least 1"),
        (
            ["trainer.limit_val_batches=0", "save.load_best=true", "trainer.stop_after.patience=2"],
            "`trainer.limit_val_batches` must be at least 1 with trainer.stop_after.patience, eval_tasks, save.load_best, which",
        ),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(folder, words, says, capsys):
    with pytest.raises(ConfigError) as e:
        train(tiny(folder, f"run_dir={folder / 'refused'}", *tasks(folder), *words))
    assert says in str(e.value), str(e.value)
    assert not (folder / "refused").exists()


def test_directions_are_known_by_name():
    wanted = {"val_loss": "min", "loss/x": "min", "mtp_loss": "min", "accuracy/arc": "max", "bleu": "max", "mfu": None, "bits_per_byte/a": "min"}
    assert {name: direction_of(name) for name in wanted} == wanted


def test_help_says_the_keys(capsys):
    assert main(["--help", "trainer.stop_after"]) == 0
    assert "patience" in capsys.readouterr().out

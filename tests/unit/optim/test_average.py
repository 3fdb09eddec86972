"""The exponential moving average of the weights."""

import json
import os
import signal

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import txtrain
from tests.cases import some
from tests.training import rows, tiny, weights
from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint import restore
from txtrain.checkpoint import save as saving
from txtrain.checkpoint.load import load
from txtrain.checkpoint.state import RunState
from txtrain.cli.main import main
from txtrain.data.tokenizer.tokenizer import byte_tokenizer
from txtrain.errors import ConfigError
from txtrain.optim.average import Average
from txtrain.optim.config import EMAConfig
from txtrain.training.run import train


def model_of(value, dtype=torch.float32):
    model = nn.Linear(2, 1, dtype=dtype)
    with torch.no_grad():
        model.weight.fill_(value)
        model.bias.fill_(-value)
    return model


@pytest.mark.parametrize("every", [1, 3])
def test_the_average_is_the_recurrence_and_begins_with_the_first_weights_it_sees(every):
    model = model_of(9.0)
    average = Average(model, EMAConfig(decay=0.75, every_n_steps=every))
    want = None
    for step in range(1, 13):
        with torch.no_grad():
            model.weight.fill_(float(step))
        average.update(step)
        if step % every == 0:
            want = step if want is None else 0.75 * want + 0.25 * step
    torch.testing.assert_close(average.values["weight"], torch.full((1, 2), float(want)), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("every", "lost", "want"), [(1, (1,), 3 / 4 * 2 + 1 / 4 * 3), (1, (1, 2), 3.0), (2, (2,), 3 / 4 * 1 + 1 / 4 * 4), (2, (4,), 2.0), (3, (1, 2, 4, 5), 3 / 4 * 3 + 1 / 4 * 6)])
def test_a_skipped_step_does_not_make_it_begin_with_the_initial_weights(every, lost, want):
    """lost: steps that made no update, of 3, or of twice `every`; weights are the number of the latest update's step."""
    model, skipped = model_of(9.0), 0
    average = Average(model, EMAConfig(decay=0.75, every_n_steps=every))
    for step in range(1, max(3, 2 * every) + 1):
        skipped += step in lost
        if step not in lost:
            with torch.no_grad():
                model.weight.fill_(float(step))
        average.update(step, skipped, made=step not in lost)
    torch.testing.assert_close(average.values["weight"], torch.full((1, 2), want), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("at", "every", "later", "says", "want"), [
    (4, 2, 8, True, 3 / 4 * 2.5 + 1 / 4 * 8), (3, 2, 2, True, 2.5), (1, 4, 4, True, 4.0),
    (3, 2, 2, False, 2.5), (1, 4, 4, False, 4.0),
])
def test_a_resumed_average_goes_on_if_it_has_begun(at, every, later, says, want, tmp_path):
    """at: the step of the checkpoint; later: every so many steps from then on; says: the checkpoint does, older ones do
    not. Weights are the step's number."""
    model, path = model_of(9.0), checkpoint.path_of(tmp_path, at)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average, resumed = (Average(model, EMAConfig(decay=0.75, every_n_steps=n)) for n in (every, later))
    for step in range(1, later * (at // later + 1) + 1):
        with torch.no_grad():
            model.weight.fill_(float(step))
        (average if step <= at else resumed).update(step)
        if step == at:
            state = RunState(step=at, averaged=average.begun if says else None)
            saving.save(path, restore.training_tensors(model, optimizer, average), state, beside=lambda _: None)
            restore.load_training(path, model, optimizer, resumed)
    torch.testing.assert_close(resumed.values["weight"], torch.full((1, 2), want), rtol=1e-6, atol=0)


def test_it_is_torchs():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = model_of(0.0)
    ours, theirs = Average(model, EMAConfig(decay=0.9)), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(1, 8):
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 2))
        ours.update(step)
        theirs.update_parameters(model)
    torch.testing.assert_close(ours.values["weight"], theirs.module.weight, rtol=1e-6, atol=1e-7)


def test_it_is_float32_where_the_weights_are_less_and_leaves_them_as_they_were():
    model = model_of(1.0, torch.bfloat16)
    average = Average(model, EMAConfig(decay=0.999))
    average.update(1)
    with torch.no_grad():
        model.weight.fill_(2.0)
    average.update(2)
    assert average.values["weight"].dtype == torch.float32
    assert average.values["weight"][0, 0] == pytest.approx(1.001)
    average.swap_in()
    average.swap_in()
    assert model.weight[0, 0] == 1.0
    average.swap_out()
    average.swap_out()
    assert model.weight[0, 0] == 2.0
    assert average.values["weight"][0, 0] == pytest.approx(1.001)


def test_frozen_weights_are_not_averaged_and_without_a_decay_nothing_is():
    model = model_of(1.0)
    model.bias.requires_grad_(False)
    assert Average(model, EMAConfig(decay=0.5)).tensors().keys() == {"ema.weight"}
    off = Average(model, EMAConfig())
    off.update(1)
    off.swap_in()
    assert off.tensors() == {}


class Stop(pl.Callback):
    """Asks the run to end as Ctrl-C does, at a hook of a step."""

    def __init__(self, hook, step):
        self.step = step
        setattr(self, hook, self.fire)

    def fire(self, trainer, module, *args, **kwargs):
        if module.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


EMA = ("ema.decay=0.8", "ema.every_n_steps=2", "model.dropout=0.1")


@pytest.mark.parametrize("hook", some(("on_train_batch_start", "on_validation_batch_end"), ("on_validation_batch_end",)))
@pytest.mark.parametrize("validate", some(("true", "false"), ("true",)))
def test_a_resumed_run_equals_the_uninterrupted_one_also_when_stopped_while_the_average_is_in_place(tmp_path, validate, hook):
    more = (*EMA, f"ema.validate={validate}", "sample.n=1", "sample.max_new_tokens=4")
    train(tiny(tmp_path, *more, f"run_dir={tmp_path / 'whole'}"))
    config = tiny(tmp_path, *more, f"run_dir={tmp_path / 'parts'}")
    assert train(config, callbacks=[Stop(hook, step=5)]).status == "preempted"
    assert train(config).status == "complete"
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert (tmp_path / "parts/samples.txt").read_text() == (tmp_path / "whole/samples.txt").read_text()


def test_validating_with_the_average_changes_the_validation_and_no_training(tmp_path):
    for name, more in {"plain": (), "kept": EMA[:2], "used": (*EMA[:2], "ema.validate=true")}.items():
        train(tiny(tmp_path, *more, f"run_dir={tmp_path / name}"))
    plain, kept, used = (rows(tmp_path / name) for name in ("plain", "kept", "used"))
    assert kept == plain
    assert [row["loss"] for row in used] == [row["loss"] for row in plain]
    assert [row["val_loss"] for row in used] != [row["val_loss"] for row in plain]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged")
    train(tiny(folder, *EMA, f"run_dir={folder / 'run'}"))
    train(tiny(folder, f"run_dir={folder / 'without'}", "trainer.max_steps=1", "scheduler=constant"))
    return folder / "run"


def test_the_averaged_weights_are_found_by_their_canonical_names(run, capsys):
    averaged, trained = load(run, weights="ema").model, load(run).model
    path = checkpoint.locate(run)
    saved = {f"ema.{name}": torch.empty_like(p) for name, p in trained.named_parameters()}
    restore.load_tensors(path, saved, prefix="ema.")
    for name, p in averaged.named_parameters():
        assert torch.equal(p, saved[f"ema.{name}"])
        assert not torch.equal(p, trained.get_parameter(name)), name
    python = txtrain.load_pretrained(run, weights="ema")
    assert all(torch.equal(a, b) for a, b in zip(python.parameters(), averaged.parameters(), strict=True))
    out = run.parent / "exported"
    assert main(["export", f"checkpoint={run}", f"out={out}", "weights=ema"]) == 0
    back = txtrain.load_pretrained(out)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), averaged.parameters(), strict=True))
    capsys.readouterr()
    assert main(["generate", f"checkpoint={run}", "prompt=The ", "weights=ema", "temperature=0", "max_new_tokens=3"]) == 0
    assert capsys.readouterr().out.startswith("The ")


def test_evaluate_predict_and_generate_read_the_average(run, capsys):
    averaged, text = txtrain.load_pretrained(run, weights="ema"), run.parent / "held_out.jsonl"
    text.write_text("".join(json.dumps({"text": f"Line {i} has {i * i} in it."}) + "\n" for i in range(8)))
    words = ["trainer.accelerator=cpu", "data=text", f"data.path={text}", "data.tokenizer=bytes", f"data.cache_dir={run.parent / 'cache'}"]
    alone = txtrain.evaluate(averaged, txtrain.compose(words, verb="evaluate"))
    with pytest.raises(ConfigError, match="`weights` must be model with a model"):
        txtrain.evaluate(averaged, txtrain.compose([*words, "weights=ema"], verb="evaluate"))
    for given in ("model", "ema"):
        made = txtrain.evaluate(run, txtrain.compose([*words, f"weights={given}"], verb="evaluate"))
        assert (made.metrics["loss"].value == pytest.approx(alone.metrics["loss"].value, abs=1e-9)) == (given == "ema")
        assert made.facts["weights"] == given
    out = run.parent / "predicted.jsonl"
    assert main(["predict", f"checkpoint={run}", *words, f"out={out}", "predict.what=log_probability", "weights=ema"]) == 0
    ids = torch.tensor([[byte_tokenizer().bos_id, *byte_tokenizer().encode("Line 0 has 0 in it.")]])
    told = json.loads(out.read_text().splitlines()[0])["log_probability"]
    assert told == pytest.approx(txtrain.log_probs(averaged, ids, ids).sum().item(), rel=1e-5)
    said = []
    for strategy in ("auto", "fsdp"):
        capsys.readouterr()
        words = ["prompt=The ", "weights=ema", "temperature=0", "max_new_tokens=5", "accelerator=cpu", f"strategy={strategy}"]
        assert main(["generate", f"checkpoint={run}", *words]) == 0
        said.append(capsys.readouterr().out.splitlines()[0])
    assert said[0] == said[1]


def test_a_checkpoint_without_an_average_says_so(run):
    with pytest.raises(ConfigError, match=r"`weights` must be model, but is ema instead: .* has no averaged weights"):
        load(run.parent / "without", weights="ema")
    with pytest.raises(ConfigError, match=r"`weights` must be one of model, ema.*Did you mean ema"):
        txtrain.compose(["checkpoint=x", "prompt=x", "weights=emma"], verb="generate")
    with pytest.raises(ConfigError, match=r"`ema\.decay` must be 0\.8 to continue"):
        train(tiny(run.parent, *EMA, "ema.decay=0.9", f"run_dir={run}", "trainer.max_steps=20"))


def test_a_hugging_face_folder_has_one_set_of_weights(run):
    out = run.parent / "folder"
    txtrain.save_pretrained(load(run).model, out)
    for use in (lambda: load(out, weights="ema"), lambda: txtrain.load_pretrained(out, weights="ema")):
        with pytest.raises(ConfigError, match="`weights` must be model for a Hugging Face folder"):
            use()


def test_an_average_that_the_checkpoint_lacks_starts_from_its_weights(run):
    from txtrain.training.module import LitModule

    config = tiny(run.parent, *EMA)
    module = LitModule(config)
    module.configure_model()
    optimizer = module.configure_optimizers()
    path = checkpoint.locate(run.parent / "without")
    restore.load_training(path, module.model, optimizer, module.average)
    assert all(torch.equal(value, module.model.get_parameter(name)) for name, value in module.average.values.items())

"""Whole runs of a tiny model: the folder, the interrupt, the resume."""

import dataclasses as dc
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from unittest import mock

import lightning.pytorch as pl
import pytest
import yaml

from tests.cases import some
from tests.training import rows, tiny, weights
from txtrain import compose, load_pretrained, registry
from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint import save as saving
from txtrain.errors import ConfigError, RunError
from txtrain.ground import files
from txtrain.ground.convert import build
from txtrain.monitor.metrics_csv import MetricsFile
from txtrain.training.run import run_train, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text and cache, shared by the runs of this file."""
    return tmp_path_factory.mktemp("runs")


class Interrupt(pl.Callback):
    """Sends a signal at a moment of the run."""

    def __init__(self, hook, step, number=signal.SIGINT, times=1):
        self.step, self.number, self.times = step, number, times
        setattr(self, hook, self.fire)

    def fire(self, trainer, module, *args, **kwargs):
        for _ in range(self.times if module.step == self.step else 0):
            os.kill(os.getpid(), self.number)


VARIANTS = {
    "adamw": (),
    "adam and dropout": ("optimizer=adam", "optimizer.lr=0.01", "model.dropout=0.2"),
    "accumulation": ("data.micro_batch_size=2", "model.dropout=0.1"),
    "bf16-mixed": ("trainer.precision=bf16-mixed", "model.dropout=0.1"),
    "bf16-true": ("trainer.precision=bf16-true",),
}


@pytest.mark.parametrize("variant", some(VARIANTS, ("accumulation", "bf16-true")))
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(folder, variant):
    whole, parts = folder / f"{variant}-whole", folder / f"{variant}-parts"
    train(tiny(folder, *VARIANTS[variant], f"run_dir={whole}"))
    config = tiny(folder, *VARIANTS[variant], f"run_dir={parts}")
    stopped = train(config, callbacks=[Interrupt("on_train_batch_start", step=6)])
    assert (stopped.status, checkpoint.step_of(checkpoint.locate(parts))) == ("preempted", 7)
    assert train(config).status == "complete"
    assert rows(parts) == rows(whole)
    assert weights(parts) == weights(whole)


@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_validation_batch_end", "on_train_batch_start"])
def test_an_interrupt_around_a_validation_is_made_up_for_by_the_resume(folder, hook, request):
    whole, parts = folder / f"{request.node.name}-whole", folder / f"{request.node.name}-parts"
    more = ("sample.n=1", "sample.max_new_tokens=4", "save.keep_best=0")  # no save of a new best right after the validation
    train(tiny(folder, f"run_dir={whole}", *more))
    config = tiny(folder, f"run_dir={parts}", *more)
    step = 4 if hook == "on_train_batch_start" else 5
    assert train(config, callbacks=[Interrupt(hook, step=step)]).status == "preempted"
    assert [int(row["step"]) for row in rows(parts)][-1] == 4, "the step that was being validated has a row already"
    # killed after the validation was made up for and before the next checkpoint, the row of step 5 is there already: not to be doubled
    with pytest.raises(ZeroDivisionError):
        train(config, callbacks=[Fail(step=6)])
    train(config)
    assert rows(parts) == rows(whole)
    assert (parts / "samples.txt").read_text() == (whole / "samples.txt").read_text()


def test_an_interrupt_in_the_last_validation_is_made_up_for_by_the_resume(folder):
    whole, parts = folder / "last-whole", folder / "last-parts"
    train(tiny(folder, f"run_dir={whole}"))
    config = tiny(folder, f"run_dir={parts}")
    assert train(config, callbacks=[Interrupt("on_validation_batch_start", step=12)]).status == "preempted"
    assert train(config).status == "complete"
    assert rows(parts) == rows(whole)


class Fail(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.step == self.step:
            raise ZeroDivisionError("on purpose")


def test_the_second_ctrl_c_does_not_break_the_save_and_the_old_handlers_return(folder, monkeypatch):
    run, before = folder / "ctrl-c", {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    config = tiny(folder, f"run_dir={run}", "save.every_n_steps=100", "trainer.val_check_interval=100")
    real = saving.save

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(saving, "save", interrupted)
    result = train(config, callbacks=[Interrupt("on_train_batch_start", step=2, times=2)])
    assert result.status == "preempted"
    checkpoint.verify(checkpoint.locate(run))
    assert json.loads((run / "run.json").read_text())["status"] == "preempted"
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_sigterm_during_the_last_step_lets_the_run_be_complete(folder):
    config = tiny(folder, f"run_dir={folder / 'last-step'}", "trainer.max_steps=3")
    assert train(config, callbacks=[Interrupt("on_train_batch_start", step=2, number=signal.SIGTERM)]).status == "preempted"
    assert train(config).status == "complete"
    config = tiny(folder, f"run_dir={folder / 'last-step-2'}", "trainer.max_steps=3", "trainer.limit_val_batches=0")
    assert train(config, callbacks=[Interrupt("on_train_batch_start", step=2, number=signal.SIGTERM)]).status == "complete"


def test_exit_codes_tell_done_and_preempted_and_a_failure_is_raised(folder, monkeypatch):
    def code(name, *callbacks):
        config = tiny(folder, f"run_dir={folder / name}", "trainer.max_steps=3")
        monkeypatch.setattr("txtrain.training.run.instances", lambda *named: list(callbacks))
        return run_train(config)

    assert code("code-0") == 0
    assert code("code-75", Interrupt("on_train_batch_start", step=1, number=signal.SIGTERM)) == 75
    with pytest.raises(ZeroDivisionError):  # exit code 1, and its traceback, are Python's own
        code("code-1", Fail(step=1))
    statuses = [json.loads((folder / f"code-{c}" / "run.json").read_text())["status"] for c in (0, 75, 1)]
    assert statuses == ["complete", "preempted", "failed"]


# --------------------------------------------------------------------------------------------------------------------- kill -9

DRIVER = """
    import os, random, signal, sys, time
    from pathlib import Path
    from tests.training import tiny
    import lightning.pytorch, torch, txtrain.training.run                   # once, for all the children

    class Slow(lightning.pytorch.Callback):                        # so that moments fall between steps as well as into saves
        def on_train_start(self, *args):
            (folder / "started").write_text(str(time.monotonic()))

        def on_train_batch_start(self, *args):
            time.sleep(0.03)

    def child(config):
        pid = os.fork()
        if pid:
            return pid
        try:
            torch.set_num_threads(1)
            sys.stdout = open(os.devnull, "w")
            txtrain.training.run.train(config, callbacks=[Slow()])
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(1)

    folder, moments = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    more = ["trainer.max_steps=40", "save.every_n_steps=2", "model.dropout=0.1", "data.micro_batch_size=4"]
    whole, parts = (tiny(folder, *more, f"run_dir={folder / name}") for name in ("whole", "parts"))
    start = time.monotonic()
    assert os.waitpid(child(whole), 0)[1] == 0
    first = float((folder / "started").read_text()) - start
    four_steps = (time.monotonic() - start - first) / 10
    slowest = first                                                # of the starts: on a busy machine a resumed one takes longer
    for kill in range(10):
        begun, pid = time.monotonic(), child(parts)
        time.sleep(moments.uniform(0.5 * first, slowest + four_steps))
        begun = float((folder / "started").read_text()) - begun
        slowest = min(1.5 * first, max(slowest, begun) if begun > 0 else 1.1 * slowest)
        assert os.waitpid(pid, os.WNOHANG)[0] == 0, f"ended by itself before kill {kill}"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        print(*sorted(p.name for p in (folder / "parts").glob("checkpoints/*")))
    assert os.waitpid(child(parts), 0)[1] == 0
"""


@pytest.mark.slow  # by default: a save that is killed, tests/unit/checkpoint/test_format.py
def test_forty_steps_killed_at_ten_random_moments_equal_the_uninterrupted_run(tmp_path):
    seed = random.randrange(10**6)
    program = [sys.executable, "-c", textwrap.dedent(DRIVER), str(tmp_path), str(seed)]
    done = subprocess.run(program, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-3000:]}"
    left = done.stdout.splitlines()
    assert len(left) == 10
    assert len(set(left)) >= 3, f"seed {seed}: the kills never met a checkpoint: {left}"
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole"), f"seed {seed}"
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole"), f"seed {seed}"
    assert [int(row["step"]) for row in rows(tmp_path / "parts")] == list(range(1, 41))


# ------------------------------------------------------------------------------------------------------------------ one curve


def test_micro_batches_of_8_4_and_1_give_one_loss_curve(folder):
    curves = {}
    for size in (8, 4, 1):
        run = folder / f"micro-{size}"
        train(tiny(folder, f"data.micro_batch_size={size}", f"run_dir={run}", "trainer.max_steps=40", "optimizer.lr=0.003"))
        curves[size] = [float(row["loss"]) for row in rows(run)]
    for size in (4, 1):
        apart = max(abs(a - b) / b for a, b in zip(curves[size], curves[8], strict=True))
        assert apart < 1e-6, f"micro-batches of {size}: largest relative difference {apart:.1e}, allowed 1e-06"


def test_the_loss_falls_far_below_its_start(folder):
    result = train(tiny(folder, f"run_dir={folder / 'falls'}", "trainer.max_steps=60", "trainer.val_check_interval=60"))
    first = float(rows(folder / "falls")[0]["loss"])
    assert first == pytest.approx(5.55, abs=0.15), "not about ln 257 at the start"
    assert result.metrics["val_loss"] < first - 2


# ------------------------------------------------------------------------------------------------------------------ the folder


def test_the_folder_is_what_it_promises(folder):
    run = folder / "whole-folder"
    config = tiny(folder, f"run_dir={run}", "sample.prompts=[The,A line]", "sample.max_new_tokens=3", "save.keep_last=2", "save.keep_best=1")
    result = train(config)
    assert result.run_dir == run
    saved = build(type(config), yaml.safe_load((run / "config.yaml").read_text()))
    assert saved == dc.replace(config, run_dir=str(run))
    told = json.loads((run / "run.json").read_text())
    assert told["status"] == "complete"
    assert told["parameters"] == config.model.n_params
    assert told["data"]["fingerprint"]
    assert {"versions", "git_commit", "hardware", "data_order_hash", "fallback"} <= told.keys()
    assert (run / "samples.txt").read_text().count("--- step 5\n") == 2
    kept = checkpoint.complete(run)
    assert checkpoint.step_of(kept[-1]) == 12
    assert len(kept) <= 3
    assert {p.name for p in kept[-1].iterdir()} >= {"complete", "config.yaml", "state.json", "tokenizer"}
    assert not list(run.rglob("*.tmp")), "leftovers"
    assert not list(run.rglob("*lightning*")), "Lightning's own files"
    assert not list(run.rglob("*.metadata")), "a pickle"


def test_rows_are_written_at_logged_steps_at_validations_and_at_the_end(folder):
    run = folder / "rows"
    train(tiny(folder, f"run_dir={run}", "trainer.log_every_n_steps=4", "trainer.val_check_interval=6", "trainer.max_steps=13"))
    validated = {int(row["step"]): row["val_loss"] != "" for row in rows(run)}
    assert validated == {4: False, 6: True, 8: False, 12: True, 13: True}


def test_a_finished_run_has_nothing_left_and_a_longer_one_goes_on(folder, capsys):
    run = folder / "finished"
    train(tiny(folder, f"run_dir={run}", "trainer.max_steps=4"))
    before, ended = (run / "metrics.csv").read_bytes(), (run / "run.json").read_bytes()
    capsys.readouterr()
    again = train(tiny(folder, f"run_dir={run}", "trainer.max_steps=4"))
    assert "nothing left to do" in capsys.readouterr().out
    assert (run / "metrics.csv").read_bytes() == before
    assert (run / "run.json").read_bytes() == ended, "the time since its end is no loss of goodput"
    assert again.metrics["step"] == 4
    train(tiny(folder, f"run_dir={run}", "trainer.max_steps=6"))
    assert [int(row["step"]) for row in rows(run)] == [1, 2, 3, 4, 5, 6]


def files_of(run):
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_start_that_is_refused_leaves_the_run_as_it_was_and_one_that_fails_says_so(folder):
    run, own = folder / "refused", "logger={x:{_target_:lightning.pytorch.loggers.CSVLogger,nosuch:1}}"
    with pytest.raises(ConfigError, match="nosuch"):
        train(tiny(folder, f"run_dir={run}", "trainer.max_steps=2", own))
    assert not run.exists()
    train(tiny(folder, f"run_dir={run}", "trainer.max_steps=2"))
    before, longer = files_of(run), (f"run_dir={run}", "trainer.max_steps=4")
    with pytest.raises(ConfigError, match="nosuch"):
        train(tiny(folder, *longer, own))
    assert files_of(run) == before
    asks = mock.patch("txtrain.training.run.make_loggers", side_effect=KeyboardInterrupt)  # as for a password
    with asks, pytest.raises(KeyboardInterrupt):
        train(tiny(folder, *longer))
    assert files_of(run) == before
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        train(tiny(folder, *longer), callbacks=[pl.callbacks.ModelCheckpoint(), pl.callbacks.ModelCheckpoint()])
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    train(tiny(folder, *longer))
    assert [int(row["step"]) for row in rows(run)] == [1, 2, 3, 4]


def test_another_config_is_refused_with_every_difference(folder):
    run = folder / "other-config"
    train(tiny(folder, f"run_dir={run}", "trainer.max_steps=2"))
    free = ("data.micro_batch_size=4", "trainer.log_every_n_steps=2", "save.keep_last=5", "sample.n=1", "trainer.max_steps=3")
    train(tiny(folder, f"run_dir={run}", *free))
    before = (run / "config.yaml").read_text()
    with pytest.raises(ConfigError) as refused:
        train(tiny(folder, f"run_dir={run}", "model.n_layers=3", "optimizer.lr=0.5"))
    assert "`model.n_layers` must be 2" in str(refused.value)
    assert "is 3 instead" in str(refused.value)
    assert "`optimizer.lr` must be 0.01" in str(refused.value)
    assert (run / "config.yaml").read_text() == before


def test_changed_text_is_refused(folder, tmp_path):
    run = tmp_path / "run"
    train(tiny(tmp_path, f"run_dir={run}", "trainer.max_steps=2"))
    with open(tmp_path / "text.txt", "a") as f:
        f.write("One more line.\n")
    with pytest.raises(ConfigError, match="the files have changed"):
        train(tiny(tmp_path, f"run_dir={run}", "trainer.max_steps=4"))


@pytest.mark.parametrize("damage", ["cut", "gone", "state"])
def test_an_unreadable_newest_checkpoint_stops_the_run_and_names_the_older(folder, damage, request):
    run = folder / request.node.name
    config = tiny(folder, f"run_dir={run}", "trainer.max_steps=8", "save.keep_best=0")
    train(config)
    newest = checkpoint.locate(run)
    shard = next(newest.glob("*.safetensors"))
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "gone":
        shard.unlink()
    else:
        text = (newest / "state.json").read_text()
        (newest / "state.json").write_text(text.replace("{", "[", 1))
    longer = dc.replace(config, trainer=dc.replace(config.trainer, max_steps=9))
    with pytest.raises(ConfigError, match=r"step_00000008 cannot be read: (?s:.*)step_00000004"):
        train(longer)
    shutil.rmtree(newest)
    train(longer)
    assert [int(row["step"]) for row in rows(run)] == list(range(1, 10))


def test_resume_names_a_run_or_its_newest_checkpoint_only(folder):
    run = folder / "named"
    config = tiny(folder, f"run_dir={run}", "trainer.max_steps=8", "save.keep_best=0")
    train(config)
    older, newest = checkpoint.complete(run)
    longer = dc.replace(config.trainer, max_steps=9)
    with pytest.raises(ConfigError, match="must be the newest checkpoint"):
        train(dc.replace(config, trainer=longer, resume=str(older)))
    train(dc.replace(config, trainer=longer, resume=str(newest)))
    assert rows(run)[-1]["step"] == "9"
    with pytest.raises(ConfigError, match="`run_dir` must be without checkpoints"):
        train(dc.replace(config, resume="never"))
    with pytest.raises(ConfigError, match="`resume` must be a run's folder"):
        train(dc.replace(config, resume=str(folder / "nowhere")))


# ------------------------------------------------------------------------------------------------------------ trainer's words


def test_fast_dev_run_trains_validates_and_writes_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(tiny(folder, "trainer.fast_dev_run=2"))
    assert (result.run_dir, result.metrics["step"]) == (None, 2)
    assert result.metrics["val_loss"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["fork", "resume"])
def test_fast_dev_run_takes_no_run_to_go_on_from(folder, key):
    """It would train freshly initialised weights, whatever the run is, or is not."""
    with pytest.raises(ConfigError, match=rf"`trainer.fast_dev_run` must be false with {key}, but is 2 .*: init_from=runs/nosuch"):
        train(dc.replace(tiny(folder, "trainer.fast_dev_run=2"), **{key: "runs/nosuch"}))


def test_overfit_batches_sees_the_same_samples_again_and_again(folder):
    train(tiny(folder, f"run_dir={folder / 'overfit'}", "trainer.overfit_batches=1", "trainer.max_steps=60"))
    assert float(rows(folder / "overfit")[-1]["loss"]) < 0.8 * min(float(row["loss"]) for row in rows(folder / "overfit")[:20])


def test_max_time_ends_with_a_validation_and_a_checkpoint(folder):
    run = folder / "time"
    config = tiny(folder, f"run_dir={run}", "scheduler=constant", "trainer.max_steps=null", "trainer.max_time=00:00:00:01")
    result = train(config)
    assert result.status == "complete"
    assert result.metrics["seconds"] >= 1
    assert rows(run)[-1]["val_loss"]
    assert checkpoint.step_of(checkpoint.locate(run)) == int(rows(run)[-1]["step"])


def test_a_schedule_that_needs_steps_is_refused_where_only_the_time_ends_the_run(folder, tmp_path):
    with pytest.raises(ConfigError, match="`scheduler` must be constant"):
        train(tiny(folder, f"run_dir={tmp_path / 'run'}", "trainer.max_steps=null", "trainer.max_time=00:00:00:01"))
    assert not (tmp_path / "run").exists()


def test_without_validation_nothing_is_validated(folder):
    result = train(tiny(folder, f"run_dir={folder / 'no-val'}", "trainer.limit_val_batches=0", "trainer.max_steps=6"))
    assert "val_loss" not in result.metrics
    assert all(row["val_loss"] == "" for row in rows(folder / "no-val"))


def test_validation_and_samples_disturb_no_random_number_of_training(folder):
    losses = []
    for name, more in (("often", ("trainer.val_check_interval=1", "sample.n=1", "sample.max_new_tokens=2")), ("never", ("trainer.limit_val_batches=0",))):
        train(tiny(folder, f"run_dir={folder / name}", "model.dropout=0.3", "trainer.max_steps=6", *more))
        losses.append([row["loss"] for row in rows(folder / name)])
    assert losses[0] == losses[1]


def test_deterministic_is_switched_on_for_the_run_and_off_after_it(folder):
    import torch

    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, module):
            seen.append(torch.are_deterministic_algorithms_enabled())

    train(tiny(folder, f"run_dir={folder / 'deterministic'}", "trainer.deterministic=true", "trainer.max_steps=1"), callbacks=[Look()])
    assert (seen, torch.are_deterministic_algorithms_enabled()) == ([True], False)


def test_losses_that_are_not_finite_end_the_run_and_name_the_batch(folder):
    config = tiny(folder, f"run_dir={folder / 'nan'}", "trainer.max_steps=9", "trainer.gradient_clip_val=null", "trainer.max_skipped_steps=2")
    with pytest.raises(FloatingPointError, match=r"Step 5 is not finite: loss nan, .* after 2 others in a row"):
        train(config, callbacks=[Poison()])
    assert json.loads((folder / "nan/run.json").read_text())["status"] == "failed"
    assert json.loads((folder / "nan/nonfinite.json").read_text())["sample_index"] == [32, 33, 34, 35, 36, 37, 38, 39]


def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_is_counted(folder):
    """Neither weights nor the optimizer's state; the steps after it are as if it had not been, but for their place in the order."""
    seen = {}

    class Once(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen[module.step] = {name: p.detach().clone() for name, p in module.model.named_parameters()}
            if module.step == 3:
                self.hook = next(module.model.parameters()).register_hook(lambda grad: grad * float("inf"))
            elif module.step == 4:
                self.hook.remove()

    result = train(tiny(folder, f"run_dir={folder / 'skipped'}", "trainer.max_steps=6"), callbacks=[Once()])
    assert all(seen[3][name].equal(seen[4][name]) for name in seen[3])
    assert not all(seen[4][name].equal(seen[5][name]) for name in seen[3])
    assert result.metrics["skipped_steps"] == 1
    assert result.metrics["loss"] < 5


class Poison(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.step == 2:
            next(module.model.parameters()).data.fill_(float("nan"))


def test_the_module_trains_under_a_trainer_of_ones_own(folder):
    import txtrain

    config = tiny(folder)
    module, data = txtrain.LitModule(config), txtrain.DataModule(config)
    trainer = pl.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    assert (module.step, trainer.global_step) == (3, 3)
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(module.val_metrics["val_loss"], rel=1e-6)


def test_loggers_write_the_columns_of_metrics_csv_into_the_folder(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = folder / "loggers"
    train(tiny(folder, f"run_dir={run}", "logger=tensorboard", "trainer.max_steps=6", "trainer.log_every_n_steps=2"))
    (events,) = run.glob("tensorboard/events*")
    read = EventAccumulator(str(events)).Reload()
    assert {"loss", "val_loss", "lr", "grad_norm", "tokens_per_second"} <= set(read.Tags()["scalars"])
    assert [e.step for e in read.Scalars("loss")] == [2, 4, 5, 6]


@pytest.mark.parametrize("stopped_at", some((None, 6), (6,)))
def test_a_checkpoint_written_behind_the_training_is_the_one_that_waiting_would_have_given(folder, stopped_at):
    behind, waiting = folder / f"behind-{stopped_at}", folder / f"waiting-{stopped_at}"
    for run_dir, how in ((behind, "true"), (waiting, "false")):
        config = tiny(folder, f"run_dir={run_dir}", f"save.async={how}", "save.every_n_steps=1", "save.keep_last=20")
        if stopped_at is not None:
            assert train(config, callbacks=[Interrupt("on_train_batch_start", step=stopped_at)]).status == "preempted"
        assert train(config).status == "complete"
    assert rows(behind) == rows(waiting)
    ours, theirs = ([*map(checkpoint.step_of, checkpoint.complete(run))] for run in (behind, waiting))
    assert ours == theirs == [*range(1, 13)]
    for a, b in zip(checkpoint.complete(behind), checkpoint.complete(waiting), strict=True):
        assert weights(a) == weights(b)


@pytest.mark.parametrize("how", ["true", "false"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(folder, monkeypatch, capsys, how):
    real = saving.write_tensors

    def full(path, tensors, group=None, step=0):
        if path.name == "step_00000008.tmp":
            (path / "shard.safetensors").write_text("half of it")
            raise OSError(28, "No space left on device")
        return real(path, tensors, group, step)

    monkeypatch.setattr(saving, "write_tensors", full)
    run_dir = folder / f"full-{how}"
    result = train(tiny(folder, f"run_dir={run_dir}", f"save.async={how}", "save.keep_best=0", "save.keep_last=9"))
    assert result.status == "complete"
    assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == ["step_00000004", "step_00000012"]
    assert "step_00000008 could not be saved" in capsys.readouterr().out


def test_an_old_checkpoint_that_cannot_be_removed_costs_a_line_and_not_the_run(folder, monkeypatch, capsys):
    real, run_dir = shutil.rmtree, folder / "unremoved"

    def busy(path, *more, **how):
        if "checkpoints" in str(path):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        real(path, *more, **how)

    monkeypatch.setattr(shutil, "rmtree", busy)
    given = (f"run_dir={run_dir}", "save.keep_best=0", "save.keep_last=1")
    assert train(tiny(folder, *given, "trainer.max_steps=8")).status == "complete"
    assert capsys.readouterr().out.count("step_00000004 could not be removed") == 1
    assert train(tiny(folder, *given, "trainer.max_steps=12", "resume_allow=[trainer.max_steps]")).status == "complete"
    assert capsys.readouterr().out.count("could not be removed") == 2
    assert [path.name for path in checkpoint.complete(run_dir)] == ["step_00000012"]


def test_a_last_checkpoint_that_cannot_be_written_fails_the_run(folder, monkeypatch):
    def full(path, tensors, group=None, step=0):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_tensors", full)
    with pytest.raises(saving.SaveError, match="No space left"):
        train(tiny(folder, f"run_dir={folder / 'full-last'}"))
    assert json.loads((folder / "full-last/run.json").read_text())["status"] == "failed"


def test_a_disk_that_is_full_between_saves_stops_the_run_as_failed_and_leaves_its_checkpoint(folder, monkeypatch):
    real, full = MetricsFile.write, []

    def write(self, row):
        if row["step"] > 5 or full:
            full.append(row)
            raise OSError(28, "No space left on device")
        real(self, row)

    real_text = files.write

    def write_text(path, text):
        if full:
            raise OSError(28, "No space left on device")
        real_text(path, text)

    monkeypatch.setattr(MetricsFile, "write", write)
    monkeypatch.setattr(files, "write", write_text)
    run_dir = folder / "full-between"
    config = tiny(folder, f"run_dir={run_dir}")
    with pytest.raises(RunError, match=r"`run_dir` must be .*full-between.*No space left"):
        train(config)
    monkeypatch.undo()
    assert json.loads((run_dir / "run.json").read_text())["status"] == "failed"
    assert checkpoint.complete(run_dir)[-1].name == "step_00000005"
    assert train(config).status == "complete"


DECAYS = {  # steps of the run, and how it ends
    "1-sqrt": (12, ("scheduler.decay_steps=4",)),
    "linear, after two stable steps more": (14, ("scheduler.decay_steps=4", "scheduler.decay_type=linear")),
    "cosine, under way at once": (11, ("scheduler.decay_steps=3", "scheduler.decay_type=cosine", "scheduler.min_lr_ratio=0.1")),
}


@pytest.mark.slow
def test_three_decays_forked_from_one_checkpoint_are_the_uninterrupted_runs_with_their_schedules(folder):
    stable, at = ("scheduler=wsd", "model.dropout=0.1", "data.micro_batch_size=4"), 8
    train(tiny(folder, f"run_dir={folder / 'stable'}", *stable, "scheduler.decay_steps=4", "trainer.max_steps=20", "save.keep_last=9"))
    parent = folder / f"stable/checkpoints/step_{at:08d}"
    for name, (steps, shape) in DECAYS.items():
        shaped = (*stable, *shape, f"trainer.max_steps={steps}")
        whole = train(tiny(folder, f"run_dir={folder / f'{name}, whole'}", *shaped)).run_dir
        forked = train(tiny(folder, f"run_dir={folder / f'{name}, forked'}", *shaped, f"fork={parent}")).run_dir
        assert rows(forked) == rows(whole)[at:], name
        assert [int(row["step"]) for row in rows(forked)] == [*range(at + 1, steps + 1)]
        assert weights(forked) == weights(whole), name
        assert json.loads((forked / "run.json").read_text())["parent"] == {"checkpoint": str(parent), "step": at}
    rates = {name: float(rows(folder / f"{name}, forked")[-1]["lr"]) for name in DECAYS}
    assert len(set(rates.values())) > 1, f"no decay differs from another: {rates}"
    again = train(tiny(folder, f"run_dir={forked}", *shaped, f"fork={parent}"))
    assert again.metrics["step"] == steps, "a fork that is complete is not begun again"


def test_what_a_fork_and_a_continued_run_may_not_change_unless_it_is_named(folder):
    run = train(tiny(folder, f"run_dir={folder / 'to-change'}", "trainer.max_steps=4")).run_dir
    with pytest.raises(ConfigError, match=r"`model.n_layers` must be 2 to fork"):
        train(tiny(folder, f"run_dir={folder / 'other'}", f"fork={run}", "model.n_layers=3"))
    assert not (folder / "other").exists()
    with pytest.raises(ConfigError, match=r"(?s)`optimizer.lr` must be 0.01.*resume_allow=\[KEY"):
        train(tiny(folder, f"run_dir={run}", "optimizer.lr=0.02", "trainer.max_steps=6"))
    assert train(tiny(folder, f"run_dir={run}", "optimizer.lr=0.02", "trainer.max_steps=6", "resume_allow=[optimizer]")).metrics["step"] == 6


def test_a_clip_value_of_zero_is_refused_and_a_run_that_has_it_is_still_read(folder, monkeypatch):
    """It would clip all of the gradient away; of Lightning's trainer it means none. Earlier versions took it."""
    run_dir, given = folder / "clip-0", ("trainer.max_steps=2", "trainer.gradient_clip_val=0")
    says = "`trainer.gradient_clip_val` must be above 0 or null, but is 0.0 instead"
    with pytest.raises(ConfigError, match=says):
        tiny(folder, *given)
    with monkeypatch.context() as earlier:
        earlier.setitem(registry._HOLDS, "above", lambda value, bound: True)
        train(tiny(folder, *given, f"run_dir={run_dir}"))
    assert load_pretrained(run_dir).config.dim == 32
    assert compose([f"checkpoint={run_dir}", "data=python_docs"], verb="evaluate").model.dim == 32
    assert compose([f"init_from={run_dir}", "data=python_docs", "trainer.max_steps=1"]).model.dim == 32
    with pytest.raises(ConfigError, match=says):
        compose([f"resume={run_dir}", "trainer.max_steps=3"])
    again = ["trainer.gradient_clip_val=null", "resume_allow=[trainer.gradient_clip_val]", "trainer.max_steps=3"]
    assert int(train(compose([f"resume={run_dir}", *again])).metrics["step"]) == 3

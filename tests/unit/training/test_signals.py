"""A run that is told to stop: what it leaves, what SLURM is asked, how it goes on."""

import dataclasses as dc
import json
import multiprocessing
import os
import signal
import time

import pytest

from tests.training import rows, tiny, weights
from tests.unit.ground.test_slurm import commands  # noqa: F401  (a fixture)
from tests.unit.training.test_run import Interrupt
from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint import save as saving
from txtrain.errors import ConfigError
from txtrain.objectives.causal_lm import CausalLM
from txtrain.training.ending import LastWords
from txtrain.training.run import run_train, train
from txtrain.training.signals import PREEMPTING, SIGNALS, Cause, Stop

SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_END_TIME")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def job(monkeypatch, commands):  # noqa: F811
    """job(restarts) -> this process is part of a SLURM job; what scontrol is asked, and what it finds on the disk then."""

    def begin(run=None, restarts=0, scontrol="exit 0"):
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        if restarts:
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        look = "" if run is None else f"ls -d {run}/checkpoints/*/complete >> {run}/seen; grep status {run}/run.json >> {run}/seen\n"
        asked = commands(scontrol=look + scontrol)
        return lambda: [line for line in asked() if line.startswith("scontrol")]

    return begin


@pytest.fixture(scope="module")
def whole(folder):
    """An uninterrupted run."""
    run = folder / "whole"
    train(tiny(folder, *MORE, f"run_dir={run}"))
    return run


MORE = ("sample.n=1", "sample.max_new_tokens=4", "model.dropout=0.1", "save.keep_best=0")


def config_of(folder, name, *more):
    return tiny(folder, *MORE, f"run_dir={folder / name}", *more)


CALLBACKS = []


@pytest.fixture(autouse=True)
def _callbacks(monkeypatch):
    """run_train takes a configuration alone."""
    CALLBACKS.clear()
    monkeypatch.setattr("txtrain.training.run.instances", lambda *named: list(CALLBACKS))


def config_with(config, *callbacks):
    CALLBACKS[:] = callbacks
    return config


@pytest.fixture
def deaf_no_more():
    before = {n: signal.getsignal(n) for n in PREEMPTING}
    yield
    for n, handler in before.items():
        signal.signal(n, handler)


pytestmark = pytest.mark.usefixtures("deaf_no_more")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_preempted_job_is_requeued_once_when_its_checkpoint_is_complete_and_goes_on_exactly(number, folder, whole, job, capfd):
    config = config_of(folder, number.name)
    run, before = folder / number.name, {n: signal.getsignal(n) for n in PREEMPTING}
    asked = job(run)
    assert run_train(config_with(config, Interrupt("on_train_batch_start", step=6, number=number, times=2))) == 75
    assert asked() == ["scontrol requeue 17"]
    seen = (run / "seen").read_text()
    assert "step_00000007/complete" in seen
    assert '"status": "preempted"' in seen
    out, err = capfd.readouterr()
    assert "SLURM runs job 17 again: scontrol requeue 17." in out
    assert err.count("stopping after this step") == 1
    for n, handler in before.items():  # SLURM sends another one now, which must not end what is left to do
        assert signal.getsignal(n) is signal.SIG_IGN
        signal.signal(n, handler)
    assert train(config).status == "complete"
    assert rows(run) == rows(whole)
    assert weights(run) == weights(whole)
    assert json.loads((run / "run.json").read_text())["slurm"] == {"job": "17", "restarts": 0}


def test_a_job_that_must_not_be_requeued_is_not(folder, job, capfd):
    asked = job()
    config = config_of(folder, "not again", "trainer.auto_requeue=false")
    assert train(config, callbacks=[Interrupt("on_train_batch_start", step=2, number=signal.SIGUSR1)]).status == "preempted"
    assert asked() == []
    assert "Job 17 is not requeued: trainer.auto_requeue=false." in capfd.readouterr().out


def test_a_refused_requeue_is_left_to_the_script(folder, job, capfd):
    asked = job(scontrol="echo no >&2; exit 1")
    config = config_of(folder, "refused")
    assert run_train(config_with(config, Interrupt("on_train_batch_start", step=2, number=signal.SIGUSR1))) == 75
    assert len(asked()) == 1
    assert "SLURM refuses (no): exit code 75 tells the script to do it." in capfd.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN


def test_a_run_that_is_told_to_stop_in_its_last_step_is_done(folder, job):
    asked = job()
    config = config_of(folder, "last", "trainer.max_steps=3", "trainer.limit_val_batches=0")
    assert train(config, callbacks=[Interrupt("on_train_batch_start", step=2, number=signal.SIGUSR1)]).status == "complete"
    assert asked() == []


def test_more_signals_while_saving_do_not_break_the_save(folder, job, monkeypatch):
    asked, real = job(), saving.save

    def interrupted(*args, **kwargs):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(saving, "save", interrupted)
    config = config_of(folder, "while saving", "save.every_n_steps=100", "trainer.val_check_interval=100")
    assert train(config, callbacks=[Interrupt("on_train_batch_start", step=2, number=signal.SIGUSR1)]).status == "preempted"
    checkpoint.verify(checkpoint.locate(folder / "while saving"))
    assert asked() == ["scontrol requeue 17"]


def test_a_checkpoint_that_is_being_written_behind_the_training_is_complete_before_the_requeue(folder, job, monkeypatch):
    run, real = folder / "behind", saving.save

    def slow(path, *args, **kwargs):
        time.sleep(0.5)
        real(path, *args, **kwargs)

    monkeypatch.setattr(saving, "save", slow)
    asked = job(run)
    config = config_of(folder, "behind", "save.async=true", "save.every_n_steps=4", "trainer.limit_val_batches=0")
    assert train(config, callbacks=[Interrupt("on_train_batch_start", step=4, number=signal.SIGUSR1)]).status == "preempted"
    seen = (run / "seen").read_text()
    assert "step_00000004/complete" in seen
    assert "step_00000005/complete" in seen
    assert asked() == ["scontrol requeue 17"]


class ToAll(Interrupt):
    """As SLURM sends it where it cannot tell a job's tasks from what they have started."""

    def fire(self, trainer, module, *args, **kwargs):
        if module.step == self.step:
            workers = multiprocessing.active_children()
            assert len(workers) >= 2
            for pid in (*(worker.pid for worker in workers), os.getpid()):
                os.kill(pid, self.number)


def test_a_signal_to_the_loaders_workers_too_changes_nothing(folder, whole, job):
    asked = job()
    config = config_of(folder, "workers", "data.num_workers=2")
    for step, number in ((2, signal.SIGUSR1), (6, signal.SIGTERM)):
        assert train(config, callbacks=[ToAll("on_train_batch_end", step=step, number=number)]).status == "preempted"
    assert train(config).status == "complete"
    assert rows(folder / "workers") == rows(whole)
    assert weights(folder / "workers") == weights(whole)
    assert asked() == ["scontrol requeue 17"]  # by this process, once


@pytest.mark.parametrize("where", ["validation", "samples"])
def test_a_signal_in_a_validation_or_a_sample_is_made_up_for_after_the_requeue(where, folder, whole, job, monkeypatch):
    asked, real = job(), CausalLM.show
    sampled = []

    def told(self, module, data, config, check):
        os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, module, data, config, lambda: (sampled.append(1), check()))

    callbacks = [Interrupt("on_validation_batch_start", step=5, number=signal.SIGUSR1)]
    if where == "samples":
        monkeypatch.setattr(CausalLM, "show", told)
        callbacks = []
    config = config_of(folder, where)
    assert train(config, callbacks=callbacks).status == "preempted"
    assert len(sampled) == (1 if where == "samples" else 0), "a sample is left at the next token"
    assert [int(row["step"]) for row in rows(folder / where)][-1] == 4
    monkeypatch.setattr(CausalLM, "show", real)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert train(config).status == "complete"
    assert asked() == ["scontrol requeue 17"]
    assert rows(folder / where) == rows(whole)
    assert weights(folder / where) == weights(whole)
    assert (folder / where / "samples.txt").read_text() == (whole / "samples.txt").read_text()


def test_a_hangup_that_is_ignored_stays_ignored():
    """nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            stop.hold()
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.asked == Cause.NONE
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_progress_is_found_under_a_name_with_slashes(folder, job, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    job(restarts=3)
    config = dc.replace(config_of(folder, "deep", "trainer.max_requeues=3"), run_dir=None, name="team/gpt2")
    assert LastWords(config, first=False)(Cause.CLUSTER) == 1
    (tmp_path / "runs/team/gpt2/slurm-17").mkdir(parents=True)
    (tmp_path / "runs/team/gpt2/slurm-17/run.json").write_text(json.dumps({"progress": {"job": "17", "restarts": 2}}))
    assert LastWords(config, first=False)(Cause.CLUSTER) == 75


def test_a_job_whose_starts_keep_no_step_is_requeued_so_often_and_then_fails(folder, job, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    asked = job(restarts=3)
    run = folder / "no progress"
    config = config_of(folder, run.name, "trainer.max_requeues=3", "trainer.limit_val_batches=0")
    assert LastWords(config, first=True)(Cause.CLUSTER) == 1
    assert "Job 17 is not requeued: more starts in a row than trainer.max_requeues have kept no step." in capfd.readouterr().err
    assert LastWords(config, first=False)(Cause.CLUSTER) == 1
    assert LastWords(dc.replace(config, trainer=dc.replace(config.trainer, max_requeues=4)), first=False)(Cause.CLUSTER) == 75
    assert asked() == []
    assert train(config, callbacks=[Interrupt("on_train_batch_start", step=2, number=signal.SIGUSR1)]).status == "preempted"
    assert json.loads((run / "run.json").read_text())["progress"] == {"job": "17", "restarts": 3}
    assert asked() == ["scontrol requeue 17"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "6")
    assert LastWords(config, first=False)(Cause.CLUSTER) == 75, "only the starts since then count"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "7")
    assert LastWords(config, first=False)(Cause.CLUSTER) == 1


# ------------------------------------------------------------------------------------------------------------- the next start


def test_a_restart_without_a_checkpoint_says_so_in_its_first_line(folder, job, capfd):
    job(restarts=2)
    config = config_of(folder, "from nothing", "trainer.max_steps=2")
    train(config)
    first = capfd.readouterr().out.splitlines()[0]
    assert first == f"SLURM restart 2 of job 17, and {folder / 'from nothing'} has no complete checkpoint: the run starts at step 0."
    train(config_of(folder, "from nothing", "trainer.max_steps=3"))
    assert "SLURM restart" not in capfd.readouterr().out


def test_each_member_of_an_array_continues_its_own_run(folder, job, monkeypatch):
    asked = job()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    config = tiny(folder, "name=array", "trainer.max_steps=4", "trainer.limit_val_batches=0")
    for task, job_id in (("0", "18"), ("1", "17")):
        monkeypatch.setenv("SLURM_JOB_ID", job_id)
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        assert train(config, callbacks=[Interrupt("on_train_batch_start", step=1, number=signal.SIGUSR1)]).status == "preempted"
    assert asked() == ["scontrol requeue 17_0", "scontrol requeue 17_1"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert train(config).status == "complete"
    runs = {path.name: path for path in (folder / "runs/array").iterdir()}
    assert {name: json.loads((path / "run.json").read_text())["status"] for name, path in runs.items()} == {
        "slurm-17_0": "preempted",
        "slurm-17_1": "complete",
    }
    assert [int(row["step"]) for row in rows(runs["slurm-17_1"])] == [1, 2, 3, 4]


def test_what_a_job_may_not_continue_it_may_when_slurm_starts_it_again(folder, job, monkeypatch):
    job()
    config = config_of(folder, "never", "resume=never", "trainer.limit_val_batches=0")
    stop = [Interrupt("on_train_batch_start", step=step, number=signal.SIGUSR1) for step in (2, 4)]
    assert train(config, callbacks=stop).status == "preempted"
    with pytest.raises(ConfigError, match="resume=never"):
        train(config)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert train(config, callbacks=stop[1:]).status == "preempted"
    assert train(config).status == "complete"
    assert [int(row["step"]) for row in rows(folder / "never")] == list(range(1, 13))
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    with pytest.raises(ConfigError, match="resume=never"):
        train(config)


def test_a_run_saves_and_stops_before_the_known_end_of_its_job(folder, job, monkeypatch, capfd):
    asked, end = job(), []

    def soon():
        end.append(time.time() + 4)
        return end[0]

    monkeypatch.setattr("txtrain.training.run.end_of_job", soon)
    config = config_of(folder, "end", "trainer.max_steps=1000000", "trainer.limit_val_batches=0", "save.every_n_steps=1000000")
    assert train(config).status == "preempted"
    assert asked() == ["scontrol requeue 17"]
    clock = time.strftime("%H:%M:%S", time.localtime(end[0]))
    assert capfd.readouterr().err.count(f"the job ends at {clock}: stopping after this step") == 1
    assert checkpoint.read_state(checkpoint.locate(folder / "end")).step == int(rows(folder / "end")[-1]["step"])
    assert json.loads((folder / "end/run.json").read_text())["status"] == "preempted"


def test_the_time_that_a_save_takes_is_measured_and_known_after_a_restart(folder, job, monkeypatch):
    job()
    real, needed = saving.save, []

    def slow(*args, **kwargs):
        time.sleep(0.3)
        real(*args, **kwargs)

    monkeypatch.setattr(saving, "save", slow)
    monkeypatch.setattr("txtrain.training.deadline.Deadline.near", lambda self, save: needed.append(save))
    config = config_of(folder, "measured", "save.every_n_steps=2", "trainer.limit_val_batches=0")
    train(config, callbacks=[Interrupt("on_train_batch_start", step=2, number=signal.SIGUSR1)])
    assert needed[0] == pytest.approx(12 * config.model.n_params / 100e6), "a guess, before the first"
    assert 0.3 <= needed[-1] < 10
    needed.clear()
    train(config)
    assert 0.3 <= needed[0] < 10

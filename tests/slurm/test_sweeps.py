"""Sweeps on a cluster: an array by script, and `hydra/launcher=slurm`."""

import dataclasses as dc
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.slurm.jobs import ONE_CPU, STEPS, at_step, facts, overrides, paced, same, submit, when
from txtrain import compose
from txtrain.cli import slurm_sweep
from txtrain.cli.slurm_member import own_signals
from txtrain.cli.slurm_sweep import Member, Queue
from txtrain.config.composed import Composed
from txtrain.config.slurm_launcher import SlurmConfig
from txtrain.errors import ConfigError

SWEEP = ("-m", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1")


def runs_of(folder):
    """Folders of a sweep's members, in order."""
    return sorted((folder / "runs/llama2-text").iterdir(), key=lambda run: int(run.name.rpartition("-")[2]))


class Sweep:
    """`txtrain -m ...` in a process of its own, which waits for its members."""

    def __init__(self, cluster, folder, seeds, *words):
        self.log = folder / f"sweep-{os.urandom(3).hex()}.txt"
        command = [sys.executable, "-m", "txtrain", *SWEEP, f"seed={seeds}", *overrides(folder), *words]
        with open(self.log, "w") as out:
            self.process = subprocess.Popen(command, cwd=folder, env=cluster.environment, stdout=out, stderr=out)
        self.timer = threading.Timer(900, self.process.kill)
        self.timer.start()

    def end(self):
        """Exit code, and what was written."""
        code = self.process.wait()
        self.timer.cancel()
        return code, self.log.read_text()


# --------------------------------------------------------------------------------------------------------- what is known of members


@pytest.fixture
def member(tmp_path):
    config = compose([*overrides(tmp_path), f"run_dir={tmp_path / 'run'}"])
    return Member(0, Composed(config, {}, []), "seed=1", tmp_path)


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """queue("17_0|RUNNING"): what squeue would say."""

    def made(text):
        monkeypatch.setattr(slurm_sweep.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, text, ""))
        return Queue(tmp_path)

    return made


def ended(member, code, **changes):
    member.record.write_text(json.dumps({"digest": member.digest, "code": code, "ended": "now"} | changes))


@pytest.mark.parametrize(("code", "state"), [(0, "complete"), (75, "preempted"), (1, "failed"), (2, "failed")])
def test_a_members_state_is_how_its_last_job_ended(code, state, member, queue):
    (member.folder / "run").mkdir()
    ended(member, code)
    assert queue("").state(member) == state


def test_a_job_that_is_in_the_queue_again_is_what_squeue_says(member, queue):
    ended(member, 75)
    (member.folder / "jobs.json").write_text('{"0": "17_3"}')
    assert queue("17_3|PENDING\n").state(member) == "pending"


def test_a_member_is_not_complete_once_its_configuration_or_its_folder_is_another(member, queue):
    ended(member, 0)
    assert queue("").state(member) == ""  # its folder is gone
    (member.folder / "run").mkdir()
    assert queue("").state(member) == "complete"
    longer = dc.replace(member.job.config, trainer=dc.replace(member.job.config.trainer, max_steps=99))
    assert queue("").state(dc.replace(member, job=dc.replace(member.job, config=longer))) == ""


def test_a_job_that_left_the_queue_without_a_word_is_lost_once_a_while_has_passed(member, queue, monkeypatch):
    (member.folder / "jobs.json").write_text('{"0": "17_3"}')
    known = queue("")
    assert known.patient(member) == "ending"
    monkeypatch.setattr(slurm_sweep, "GRACE", -1.0)
    assert known.patient(member) == "lost"


def test_members_of_several_layouts_are_no_array(member):
    other = dc.replace(member.job.config, trainer=dc.replace(member.job.config.trainer, num_nodes=2, devices=1))
    with pytest.raises(ConfigError, match=r"one layout, .* 1 x 1, 2 x 1"):
        slurm_sweep._check([member, dc.replace(member, number=1, job=dc.replace(member.job, config=other))], SlurmConfig())


def test_a_member_that_does_not_fit_is_named(member):
    with pytest.raises(ConfigError, match=r"member 0 \(seed=1\): `plan.memory` must be at least"):
        slurm_sweep._check([member], SlurmConfig(gpu_memory="1MB"))


def test_the_same_sweep_is_found_again_by_its_members(tmp_path):
    lines = [["++seed=1"], ["++seed=2"]]
    assert slurm_sweep.identity("train", lines) == slurm_sweep.identity("train", [list(line) for line in lines])
    assert slurm_sweep.identity("train", lines) != slurm_sweep.identity("train", lines[:1])
    assert slurm_sweep.identity("train", lines) != slurm_sweep.identity("generate", lines)


def test_a_member_takes_the_signals_from_submitit_and_hears_its_own_as_the_end_of_time():
    pytest.importorskip("submitit")
    numbers = (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    heard = []
    try:
        for number in numbers:
            signal.signal(number, lambda number, _: heard.append(f"submitit {number}"))
        own_signals()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
        signal.raise_signal(signal.SIGUSR2)
        assert heard == [signal.SIGUSR1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_members_script_requeues_unless_that_is_not_wanted_and_has_txtrains_signal():
    wanted = slurm_sweep._parameters(SlurmConfig(signal_delay_s=90), 2, 4, requeue=True)
    assert (wanted["nodes"], wanted["tasks_per_node"]) == (2, 4)
    assert wanted["slurm_additional_parameters"] == {"requeue": True, "signal": "USR1@90"}
    assert any("scontrol requeue" in line for line in wanted["slurm_teardown"])
    assert slurm_sweep._parameters(SlurmConfig(), 1, 1, requeue=False)["slurm_teardown"] == []


# --------------------------------------------------------------------------------------------------------------------- on a cluster


@pytest.mark.slow
def test_an_array_of_four_and_after_one_was_killed_only_that_one(cluster, tmp_path):
    (tmp_path / "seeds.txt").write_text("".join(f"seed={seed}\n" for seed in (1, 2, 3, 4)))
    words = ["array.sh", *ONE_CPU, "seeds.txt", *overrides(tmp_path), *paced(0.3)]
    first = submit(cluster, tmp_path, *words)
    runs = [tmp_path / f"runs/seeds/{i}" for i in range(4)]
    when(at_step(runs[2], 6), cluster)
    cluster.call("scancel", f"{first}_2")
    when(lambda: not cluster.call("squeue", "-h", "-j", first), cluster)
    assert [facts(run)["status"] == "complete" for run in runs] == [True, True, False, True]
    ends = {run: (run / "run.json").stat().st_mtime_ns for run in runs}
    second = submit(cluster, tmp_path, *words)
    assert cluster.job(second)["ArrayTaskId"] == "2"
    when(lambda: not cluster.call("squeue", "-h", "-j", second), cluster)
    assert [facts(run)["status"] for run in runs] == ["complete"] * 4
    assert [run for run in runs if (run / "run.json").stat().st_mtime_ns != ends[run]] == [runs[2]]
    assert all(at_step(run, STEPS)() for run in runs)
    assert submit(cluster, tmp_path, *words) == "complete"  # the last word of: all of runs/seeds are complete


@pytest.mark.slow
def test_a_submitit_sweep_of_four_and_after_one_was_killed_only_that_one(cluster, tmp_path):
    sweep = Sweep(cluster, tmp_path, "1,2,3,4", *paced(0.3))
    when(lambda: any(at_step(run, 6)() for run in tmp_path.glob("runs/llama2-text/*-2")), cluster)
    jobs = json.loads(next(tmp_path.glob("runs/sweeps/*/jobs.json")).read_text())
    cluster.call("scancel", jobs["2"])
    code, text = sweep.end()
    assert code in (1, 75), text  # by what it was at, the member was lost, or was stopped after a checkpoint
    runs = runs_of(tmp_path)
    assert [facts(run)["status"] == "complete" for run in runs] == [True, True, False, True]
    code, text = Sweep(cluster, tmp_path, "1,2,3,4", *paced(0.3)).end()
    assert code == 0, text
    assert text.count("is complete: not submitted again") == 3
    assert "submitted 1 of 4 members" in text
    again = json.loads(next(tmp_path.glob("runs/sweeps/*/jobs.json")).read_text())
    assert [number for number in jobs if again[number] != jobs[number]] == ["2"]
    assert runs_of(tmp_path) == runs
    assert all(facts(run)["status"] == "complete" and at_step(run, STEPS)() for run in runs)
    code, text = Sweep(cluster, tmp_path, "1,2,3,4", *paced(0.3)).end()
    assert (code, text.count("is complete: not submitted again")) == (0, 4)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["partition high", "SIGUSR1", "SIGUSR2"])
def test_under_submitit_one_preemption_is_one_requeue(how, cluster, tmp_path):
    """SIGUSR2 is what submitit itself would answer by requeueing."""
    sweep = Sweep(cluster, tmp_path, "1", *paced(0.5))
    run = tmp_path / "runs/llama2-text"
    when(lambda: run.exists() and at_step(next(run.iterdir()), 6)(), cluster)
    (number,) = json.loads(next(tmp_path.glob("runs/sweeps/*/jobs.json")).read_text()).values()
    if how == "partition high":
        high = cluster.call("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1").strip()
        cluster.until(high, "ended")
    else:
        cluster.call("scancel", f"--signal={how}", number)
    code, text = sweep.end()
    assert code == 0, text
    assert cluster.job(number)["Restarts"] == "1"
    log = next(tmp_path.glob("runs/sweeps/*/logs/*_log.out")).read_text()
    assert log.count("SLURM runs job") == 1, log
    assert "Calling checkpoint method" not in log  # submitit's
    alone = tmp_path / "alone"
    cluster.call("txtrain", *overrides(tmp_path, "seed=1", f"run_dir={alone}"))
    same(alone, next(run.iterdir()))

"""A job that is interrupted as clusters do it goes on by itself, and in the end is the run that nothing happened to. One folder throughout."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.slurm.jobs import STEPS, TWO_NODES, at_step, facts, overrides, paced, said, same, submit, when

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(cluster, folder):
    """whole("ddp"): the folder of a run that nothing interrupts."""
    made = {}

    def run(strategy):
        if strategy not in made:
            made[strategy] = folder / f"whole-{strategy}"
            number = submit(cluster, folder, "many_nodes.sh", *TWO_NODES, *overrides(folder, f"strategy={strategy}", f"run_dir={made[strategy]}"))
            assert cluster.until(number, "ended")["JobState"] == "COMPLETED", said(folder, number)
        return made[strategy]

    return run


@pytest.fixture
def started(cluster, folder, request, monkeypatch):
    """started("ddp", seconds a step): the job's number and the run's folder, with W&B's files in it."""

    monkeypatch.setenv("WANDB_MODE", "offline")

    def start(strategy, seconds, *options):
        run = folder / re.sub(r"\W+", "-", request.node.name)
        words = overrides(folder, f"strategy={strategy}", f"run_dir={run}", *paced(seconds), "logger=wandb")
        return submit(cluster, folder, "many_nodes.sh", *TWO_NODES, *options, *words), run

    return start


def ends_as(run, whole, cluster, number, folder, restarts):
    """The run is complete after so many restarts, equal to the uninterrupted one, and one run for W&B."""
    job = cluster.until(number, "ended", timeout=900)
    text = said(folder, number)
    assert job["JobState"] == "COMPLETED", text
    assert int(job["Restarts"]) in restarts, text
    assert facts(run)["status"] == "complete"
    same(whole, run)
    written = list(run.rglob("run-*.wandb"))
    assert len({file.name for file in written}) == 1, written
    print(f"job {number}: {job['Restarts']} restarts, {len(written)} files of W&B run {written[0].stem}")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_nodes_train_to_the_end(strategy, whole):
    assert facts(whole(strategy))["hardware"]["processes"] == 2
    assert at_step(whole(strategy), STEPS)()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_job_whose_time_is_over_requeues_itself_and_goes_on(strategy, cluster, folder, started, whole):
    """The limit is two minutes, of which the signal leaves one; the steps alone take longer than twice that."""
    number, run = started(strategy, 4.5, "--time=2", "--signal=USR1@60")
    ends_as(run, whole(strategy), cluster, number, folder, range(2, 9))
    assert "SIGUSR1" in said(folder, number)


def test_a_job_that_gives_way_to_another_partition_is_requeued_once_for_each_time(cluster, folder, started, whole):
    number, run = started("ddp", 0.5)
    for step in (6, 12):
        when(at_step(run, step), cluster, number)
        high = cluster.call("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1").strip()
        assert cluster.until(high, "ended")["JobState"] == "COMPLETED"
        cluster.until(number, "RUNNING")
    ends_as(run, whole("ddp"), cluster, number, folder, [2])


def test_a_job_whose_node_dies_goes_on_when_there_is_one_again(cluster, folder, started, whole):
    """First the second node, then the one that runs the script."""
    number, run = started("ddp", 0.5)
    for node, step in (("node2", 6), ("node1", 14)):
        when(at_step(run, step), cluster, number)
        cluster.node_down(node)
        when(lambda: cluster.job(number)["JobState"] == "PENDING", cluster, number)  # SLURM has noticed
        cluster.node_up(node)
        cluster.until(number, "RUNNING")
    ends_as(run, whole("ddp"), cluster, number, folder, [2])


def test_a_job_whose_processes_are_killed_goes_on(cluster, folder, started, whole):
    """All of them by SIGKILL, which no process can answer."""
    number, run = started("fsdp", 0.5)
    for step in (6, 14):
        when(at_step(run, step), cluster, number)
        killed = list(cluster.processes(own="txtrain\0train"))
        assert len(killed) >= 2
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        when(lambda: cluster.job(number)["JobState"] == "PENDING", cluster, number)
        cluster.until(number, "RUNNING")
    ends_as(run, whole("fsdp"), cluster, number, folder, [2])


def test_a_process_that_is_stopped_is_named_by_the_others_after_a_minute(cluster, folder, started):
    number, run = started("ddp", 0.5, "--time=10")
    when(at_step(run, 2), cluster, number)
    second = [pid for pid in cluster.processes(own="txtrain\0train") if b"\0SLURM_PROCID=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    (hit,) = [pid for pid in second if b"srun" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(hit, signal.SIGSTOP)
    when(lambda: f"rank 1 (pid {hit} on " in said(folder, number), cluster, number, timeout=90)
    assert "has been stopped by a signal (SIGSTOP) for 60 s: all are ended." in said(folder, number)
    cluster.call("scancel", number)
    cluster.until(number, "ended")

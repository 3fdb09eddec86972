"""What SLURM's variables and commands say, and what is made of it."""

import os
import stat
import time

import pytest

from txtrain.errors import ConfigError
from txtrain.ground import slurm
from txtrain.ground.slurm import PORTS, Job, Task, hosts, meeting_point, per_node
from txtrain.parallel.world import World, started
from txtrain.run_config import TrainerConfig
from txtrain.training.deadline import SPARE, Deadline


def step(rank=0, tasks="2(x2)", nodes="node[1-2]", **more):
    """The variables of a task of srun; per_node tasks are dealt out by blocks."""
    counts = per_node(tasks)
    node = next(i for i in range(len(counts)) if rank < sum(counts[: i + 1]))
    local = rank - sum(counts[:node])
    place = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)}
    return {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_STEP_NODELIST": nodes, **place, **more}


BATCH = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node[1-2]"}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("node[1-3,7]", ["node1", "node2", "node3", "node7"]),
        ("a[01-03]b,c", ["a01b", "a02b", "a03b", "c"]),
        ("gpu[098-101]", ["gpu098", "gpu099", "gpu100", "gpu101"]),
        ("r[1-2]n[3,5],x-1", ["r1n3", "r1n5", "r2n3", "r2n5", "x-1"]),
    ],
)
def test_a_list_of_nodes_is_expanded(text, names):
    assert hosts(text) == names


def test_tasks_per_node_are_expanded():
    assert per_node("2(x3),1") == (2, 2, 2, 1)
    assert per_node("8") == (8,)


def test_a_job_its_restarts_and_a_member_of_an_array():
    assert Job.here({}) is None
    assert Job.here({"SLURM_JOB_ID": "17"}) == Job("17", 0)
    assert Job.here({"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "0", "SLURM_RESTART_COUNT": "2"}) == Job("17_0", 2)


def test_the_processes_of_a_step_are_the_tasks_of_srun():
    assert [World.here(step(rank)) for rank in range(4)] == [World(0, 4, 0, 2), World(1, 4, 1, 2), World(2, 4, 0, 2), World(3, 4, 1, 2)]


def test_ranks_go_by_nodes_when_srun_deals_the_tasks_out_in_turn():
    cyclic = [step(SLURM_PROCID=str(i), SLURM_NODEID=str(i % 2), SLURM_LOCALID=str(i // 2)) for i in range(4)]
    assert [World.here(place) for place in cyclic] == [World(0, 4, 0, 2), World(2, 4, 0, 2), World(1, 4, 1, 2), World(3, 4, 1, 2)]


@pytest.mark.parametrize(
    "variables",
    [
        BATCH,
        {**BATCH, "SLURM_STEP_ID": str(0xFFFFFFFB)},
        {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "2"},  # salloc
        step(tasks="1", nodes="node1", SLURM_PTY_PORT="34185"),  # srun --pty bash
    ],
    ids=["batch", "batch step", "salloc", "shell"],
)
def test_a_batch_script_and_a_shell_in_a_job_start_the_processes_themselves(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert World.here() == World()
    assert not started()


def test_torchrun_within_a_step_says_where_a_process_stands():
    assert World.here({**step(tasks="1(x2)"), "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}) == World(5, 8, 1, 4)


# ------------------------------------------------------------------------------------------------------------------ the layout


def problem(variables, **trainer):
    with pytest.raises(ConfigError) as raised:
        Task.here(variables).check(TrainerConfig(max_steps=1, **trainer))
    return str(raised.value)


def test_a_layout_that_fits_is_taken():
    Task.here(step()).check(TrainerConfig(max_steps=1, devices=2, num_nodes=2))
    Task.here(step()).check(TrainerConfig(max_steps=1, num_nodes=2))
    Task.here(step(tasks="1", nodes="a")).check(TrainerConfig(max_steps=1))


@pytest.mark.parametrize(
    ("variables", "trainer", "says"),
    [
        (step(tasks="2", nodes="a"), {"devices": 4}, ["1 node x 2 tasks", "1 node x 4 processes (trainer.devices=4)", "srun --nodes=1 --ntasks-per-node=4"]),
        (step(), {"devices": 2}, ["2 nodes x 2 tasks", "1 node x 2 processes", "srun --nodes=1 --ntasks-per-node=2", "trainer.num_nodes=2 trainer.devices=2"]),
        (step(tasks="2,1"), {"devices": 2, "num_nodes": 2}, ["2 nodes with 2, 1 tasks", "srun --nodes=2 --ntasks-per-node=2"]),
        (step(tasks="1", nodes="a"), {"devices": 2}, ["1 node x 1 task", "srun --nodes=1 --ntasks-per-node=2", "no srun"]),
    ],
)
def test_a_layout_that_does_not_fit_is_told_with_both_sides_and_the_right_srun(variables, trainer, says):
    told = problem(variables, **trainer)
    assert all(text in told for text in says), told


def test_one_task_tells_what_all_find():
    assert problem(step(rank=1), devices=3) == ""


def test_a_gpu_of_the_job_without_a_process_is_told(monkeypatch):
    monkeypatch.setattr("txtrain.ground.slurm._gpus", lambda accelerator: 4)
    assert "1 node x 4 processes (trainer.devices=auto)" in problem(step(tasks="1", nodes="a"))


# ------------------------------------------------------------------------------------------------------------------- meeting


def test_jobs_steps_and_restarts_on_one_node_meet_at_ports_of_their_own():
    variables = [{"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(s), "SLURM_RESTART_COUNT": str(n)} for job in range(40) for s in range(3) for n in range(3)]
    ports = [meeting_point({**step(tasks="2", nodes="node1"), **some})[1] for some in variables]
    assert len(set(ports)) == len(ports)
    assert all(port in PORTS for port in ports)


def test_the_tasks_of_one_node_meet_there_and_those_of_several_on_the_first():
    assert meeting_point(step(tasks="2", nodes="nowhere7"))[0] == "127.0.0.1"
    assert meeting_point(step(nodes="localhost,nowhere7"))[0] == "localhost"


def test_where_the_script_says_they_meet_they_meet():
    assert meeting_point(step(MASTER_ADDR="there", MASTER_PORT="99")) == ("there", 99)


def program(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """commands(scontrol="exit 0") puts that program on the PATH, alone but for the system's; what scontrol was asked is in `asked`."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "_requeued", set())
    program(tmp_path, "squeue", "exit 1")
    program(tmp_path, "sinfo", "exit 1")

    def make(**programs):
        for name, text in programs.items():
            program(tmp_path, name, f'echo {name} "$@" >> {tmp_path}/asked\n{text}')
        return lambda: (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []

    return make


def test_a_node_that_only_slurm_knows_has_slurms_address(commands):
    asked = commands(sinfo="echo 10.0.0.3")
    assert meeting_point(step(nodes="nowhere7,nowhere8"))[0] == "10.0.0.3"
    assert "--nodes nowhere7" in asked()[0]


# ------------------------------------------------------------------------------------------------------------------- requeue

FIELDS = "printf '%-60s%-60s%-60s\\n' "


@pytest.mark.parametrize(
    ("squeue", "requeues", "says"),
    [
        ("exit 1", True, "runs job 17_3 again: scontrol requeue 17_3"),
        (f"{FIELDS} RUNNING None 1", True, "runs job 17_3 again: scontrol requeue 17_3"),
        (f"{FIELDS} COMPLETING TimeLimit 1", True, "runs job 17_3 again: scontrol requeue 17_3"),
        (f"{FIELDS} COMPLETING None 1", False, "was cancelled"),
        (f"{FIELDS} CANCELLED None 1", False, "was cancelled"),
        (f"{FIELDS} COMPLETING None 2", False, "again by itself"),
        (f"{FIELDS} PENDING BeginTime 1", False, "again by itself"),
    ],
)
def test_a_job_is_requeued_unless_slurm_does_it_or_a_person_has_cancelled_it(squeue, requeues, says, commands):
    asked = commands(scontrol="exit 0", squeue=squeue)
    assert says in Job("17_3", restarts=1).requeue()
    assert [line for line in asked() if line.startswith("scontrol")] == ["scontrol requeue 17_3"] * requeues


def test_a_job_of_a_wandb_agent_is_not_requeued_for_one_of_its_trials(commands, monkeypatch):
    asked = commands(scontrol="exit 0")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert "W&B agent" in Job("17").requeue()
    assert asked() == []


def test_a_job_is_requeued_once(commands):
    asked = commands(scontrol="exit 0")
    assert all("runs job 17 again" in Job("17").requeue() for _ in range(2))
    assert asked() == ["scontrol requeue 17"]


def test_a_requeue_that_is_refused_or_impossible_is_said(commands, monkeypatch, tmp_path):
    commands(scontrol="echo 'Requested operation is presently disabled for job 17' >&2; exit 1")
    assert "SLURM refuses (Requested operation is presently disabled for job 17): exit code 75" in Job("17").requeue()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert "scontrol is not there: exit code 75" in Job("17").requeue()


# ------------------------------------------------------------------------------------------------------------ the job's end


def test_the_end_of_a_job_is_a_variable_or_asked_for(commands, monkeypatch):
    asked = commands(squeue="echo 2026-11-24T12:34:56")
    assert Job("17").end() == time.mktime((2026, 11, 24, 12, 34, 56, 0, 0, -1))
    assert len(asked()) == 1
    commands(squeue="echo N/A")
    assert Job("17").end() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1700000000")
    assert Job("17").end() == 1_700_000_000.0


def test_a_save_begins_early_enough_for_the_longest_step_and_two_saves():
    now = 0.0
    deadline = Deadline(1000.0, clock=lambda: now)
    stopped = []
    for seconds in (100.0, 3.0, 7.0, *[2.0] * 600):  # the first compiles: it does not count
        now += seconds
        if deadline.near(save=20.0):
            stopped.append(now)
    assert deadline.longest == 7.0
    assert 1000 - 7 - 40 - SPARE <= stopped[0] < 1000 - 7 - 40 - SPARE + 2


def test_what_lies_around_a_save_is_no_step():
    now = 0.0
    deadline = Deadline(10_000.0, clock=lambda: now)
    for seconds in (1.0, 1.0, 300.0, 1.0):
        now += seconds
        if seconds == 300.0:
            deadline.pause()
        deadline.near(1.0)
    assert deadline.longest == 1.0


def test_a_job_too_short_for_its_save_trains_for_half_of_its_time():
    now = 0.0
    deadline = Deadline(60.0, clock=lambda: now)
    assert not deadline.near(save=500.0)
    now = 29.0
    assert not deadline.near(save=500.0)
    now = 30.0
    assert deadline.near(save=500.0)


def test_without_a_known_end_nothing_is_near():
    assert not Deadline(None).near(1e9)
    assert not Deadline(time.time() - 5).near(1e9), "SLURM lets this job run on"


def test_no_variable_of_a_job_reaches_the_tests():
    assert not [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]

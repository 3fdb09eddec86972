"""What one process meets, all answer; none is left behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.compose.conftest import ROOT
from tests.distributed import group
from tests.distributed.group import command_line
from tests.distributed.runs import overrides
from txtrain.metrics import read


def start(arguments, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command, pipe = [sys.executable, "-m", "txtrain", *arguments], subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(there, seconds=120):
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def long_run(tmp_path):
    return overrides(tmp_path, "decoder", "run", "trainer.max_steps=100000", "trainer.devices=2", "strategy=ddp", "trainer.limit_val_batches=0")


def begun(folder):
    return (folder / "run/metrics.csv").exists() and len((folder / "run/metrics.csv").read_text().splitlines()) > 3


@pytest.mark.parametrize("who", ["a process", "the command"])
def test_a_process_that_dies_takes_the_others_down(tmp_path, long_run, who):
    command = start(long_run, tmp_path)
    wait_for(lambda: begun(tmp_path))
    workers = children(command.pid)
    assert len(workers) == 2
    os.kill(workers[1] if who == "a process" else command.pid, signal.SIGKILL)
    _, err = command.communicate(timeout=60)
    assert command.returncode == (1 if who == "a process" else -signal.SIGKILL)
    if who == "a process":
        assert "process 1 was killed by SIGKILL" in err
    wait_for(lambda: not any(map(alive, workers)), 10)


def test_one_signal_to_the_command_stops_all_with_one_checkpoint(tmp_path, long_run):
    command = start(long_run, tmp_path)
    wait_for(lambda: begun(tmp_path))
    command.send_signal(signal.SIGINT)
    out, err = command.communicate(timeout=60)
    assert command.returncode == 75, err
    assert out.count("to continue: txtrain resume=") == 1
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1


def test_the_users_mistake_is_told_once(tmp_path):
    (tmp_path / "run").mkdir()
    for more, says in ((["data.path=nowhere"], "data.path"), (["strategy=hsdp", "trainer.devices=3", "data.global_batch_size=9"], "dp_replicate_size")):
        done = command_line([*overrides(tmp_path, "decoder", "run", "trainer.devices=2", "strategy=ddp"), *more], tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("txtrain: ") == 1
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_processes_that_were_started_differently_are_told_so(tmp_path):
    run = overrides(tmp_path, "decoder", "run", "trainer.devices=2", "strategy=ddp")
    command = ["bash", "-c", f'exec {sys.executable} -m txtrain "$@" optimizer.lr=0.00$((RANK + 1))', "bash", *run]
    said = group.run(command, 2, tmp_path, ends_with=2)
    assert said.count("txtrain: ") == 1
    assert "`optimizer.lr` must be the same in all processes, but is 0.002 in process 1 and 0.001 in process 0." in said
    assert not (tmp_path / "run").exists()


def test_a_gradient_that_is_not_finite_in_one_process_is_skipped_in_all(tmp_path):
    """Under every way to exchange gradients: the losses of the steps before it are those without it, and so is all of the next."""
    ways = {"ddp": ("strategy=ddp",), "fsdp": ("strategy=fsdp",), "zero": ("strategy=deepspeed_stage_2",)}
    cases = {}
    for way, how in ways.items():
        run = overrides(tmp_path, "decoder", way, "trainer.devices=2", "trainer.max_steps=6", "trainer.limit_val_batches=0", *how)
        cases[way] = group.Case(run, ["POISON 3 1"])
    group.train(cases, 2, tmp_path / "group")
    seen = {way: read(tmp_path / way / "metrics.csv") for way in ways}
    for way, rows in seen.items():
        assert [int(row["skipped_steps"]) for row in rows] == [0, 0, 0, 1, 1, 1], way
        assert all(float(row["loss"]) < 7 for i, row in enumerate(rows) if i != 3), way
        assert float(rows[5]["loss"]) == pytest.approx(float(seen["ddp"][5]["loss"]), rel=1e-5), way


def test_torchrun_starts_the_same_run(tmp_path):
    run = overrides(tmp_path, "decoder", "run", "trainer.max_steps=2", "strategy=fsdp")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "txtrain", *run]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done:") == 1
    assert "fsdp, 2 processes" in done.stdout

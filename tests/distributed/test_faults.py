"""What one process meets, all answer; none is left behind."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.compose.conftest import ROOT
from tests.distributed import group
from tests.distributed.group import alive, command_line
from tests.distributed.runs import overrides
from txtrain.config.paths import options
from txtrain.monitor.metrics_csv import read


def start(arguments, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command, pipe = [sys.executable, "-m", "txtrain", *arguments], subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found]


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


@pytest.mark.slow  # by default tests/unit/parallel/test_launch.py shows it of processes that do not train
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
        assert f"rank 1 (pid {workers[1]} on {socket.gethostname()}) was killed by SIGKILL" in err
    wait_for(lambda: not any(map(alive, workers)), 10)


def test_one_signal_to_the_command_stops_all_with_one_checkpoint(tmp_path, long_run):
    command = start(long_run, tmp_path)
    wait_for(lambda: begun(tmp_path))
    command.send_signal(signal.SIGINT)
    out, err = command.communicate(timeout=60)
    assert command.returncode == 75, err
    assert out.count("to continue: txtrain resume=") == 1
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_the_users_mistake_is_told_once(tmp_path):
    (tmp_path / "run").mkdir()
    for more, says in ((["data.path=nowhere"], "data.path"), (["strategy=hsdp", "trainer.devices=3", "data.global_batch_size=9"], "dp_replicate_size")):
        done = command_line([*overrides(tmp_path, "decoder", "run", "trainer.devices=2", "strategy=ddp"), *more], tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("txtrain: ") == 1
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def differently(folder, before, *more):
    """What two processes say that are not started alike. before: shell, in which $RANK is known; more: arguments, likewise."""
    run = overrides(folder, "decoder", "run", "trainer.devices=2", "strategy=ddp")
    said = group.run(["bash", "-c", f'{before}; exec {sys.executable} -m txtrain "$@" {" ".join(more)}', "bash", *run], 2, folder, ends_with=2)
    told, silent = said.split("=== process 1")
    assert "txtrain: " in told
    assert "Traceback" not in told
    heard = [line for line in silent.splitlines() if line.strip() and not line.startswith("tokenised ")]  # each on its machine, where both have a text
    assert not heard, "one process tells it"
    assert not (folder / "run").exists()
    return told


@pytest.mark.slow
def test_processes_that_were_started_differently_are_told_so(tmp_path):
    said = differently(tmp_path, ":", "optimizer.lr=0.00$((RANK + 1))")
    assert said.count("txtrain: ") == 1
    assert "`optimizer.lr` must be the same in all processes, but is 0.002 in process 1 and 0.001 in process 0." in said


@pytest.mark.slow
def test_processes_with_other_code_are_told_so(tmp_path):
    """On two machines the package and a file of one's own may differ, though they are called the same."""
    for rank in (0, 1):
        machine = tmp_path / str(rank)
        for part in ("txtrain", "conf", "recipes"):
            shutil.copytree(ROOT / part, machine / part, ignore=shutil.ignore_patterns("__pycache__"))
        (machine / "mine.py").write_text(f"SCALE = {rank}\n")
    with (tmp_path / "1/txtrain/model/ffn/balancing.py").open("a") as f:
        f.write("# changed\n")
    said = differently(tmp_path, f'cd {tmp_path}/$RANK; export PYTHONPATH="$PWD"', "imports=[mine]")
    for name in ("txtrain", "mine"):
        found = re.search(rf"`the code of {name}` must be the same in all processes, but is (\w{{12}}) in process 1 and (\w{{12}}) in process 0", said)
        assert found, said
        assert found[1] != found[2]
    assert said.count("must be the same") == 2


@pytest.mark.slow
def test_processes_of_different_strategies_do_not_wait_for_each_other(tmp_path):
    said = differently(tmp_path, "how=(ddp tp)", "strategy=${how[$RANK]}")
    assert "`strategy.type` must be the same in all processes, but is tp in process 1 and ddp in process 0." in said
    assert "`strategy.tp_size` must be the same in all processes, but is None in process 1 and not there in process 0." in said


@pytest.mark.slow
def test_processes_that_read_other_data_are_told_so(tmp_path):
    """The same path, on two machines that have another text there."""
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "text.txt").write_text(f"A line of machine {rank}, of many.\n" * 200)
    said = differently(tmp_path, f"cd {tmp_path}/$RANK", "data.path=text.txt", "data.cache_dir=cache")
    assert re.search("`the fingerprint of the data` must be the same in all processes, but is .* in process 1 and .* in process 0", said), said


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_whose_only_step_was_skipped_is_resumed(tmp_path):
    cases = {}
    for way in ("ddp", "fsdp", "deepspeed_stage_2", "deepspeed_stage_3"):
        for name, last in (("whole", (3,)), ("parts", (1, 3))):
            given = overrides(tmp_path, "decoder", f"{way}, {name}", "trainer.devices=2", "scheduler=constant", "trainer.limit_val_batches=0", f"strategy={way}")
            cases |= {f"{way}, {name} to {n}": group.Case([*given, f"trainer.max_steps={n}"], ["POISON 0 1"]) for n in last}
    group.train(cases, 2, tmp_path / "group", 600)
    for way in ("ddp", "fsdp", "deepspeed_stage_2", "deepspeed_stage_3"):
        whole, parts = ([{name: row[name] for name in ("loss", "skipped_steps")} for row in read(tmp_path / f"{way}, {name}" / "metrics.csv")] for name in ("whole", "parts"))
        assert parts == whole, way


SIZES = {"hsdp": 4, "fsdp_tp": 4}  # processes, where two would not show what the strategy is


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_torchruns_ranks_end_when_one_is_stopped_for_a_minute_or_killed(tmp_path, long_run, number, rank):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "txtrain", *long_run]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = subprocess.Popen(torchrun, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: begun(tmp_path))
        workers = children(command.pid)
        hit = next(pid for pid in workers if f"\0RANK={rank}\0" in f"\0{Path(f'/proc/{pid}/environ').read_text()}")
        began = time.monotonic()
        os.kill(hit, number)
        _, err = command.communicate(timeout=150)
        seconds = time.monotonic() - began
        assert command.returncode == 1
        wait_for(lambda: not any(map(alive, workers)), 10)
        if number == signal.SIGSTOP:
            assert err.count(f"rank {rank} (pid {hit} on {socket.gethostname()}) has been stopped by a signal (SIGSTOP) for 6") == 1, err[-3000:]
            assert 55 < seconds < 120
        else:
            assert seconds < 60
            assert re.search(rf"rank *: {rank} \(local_rank: {rank}\)\s+exitcode *: -9 \(pid: {hit}\)", err), err[-3000:]
    finally:  # a failure leaves no run behind
        for pid in (*children(command.pid), command.pid) if command.poll() is None else ():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [s for s in options("strategy") if s != "auto"])
def test_torchrun_starts_the_same_run(tmp_path, strategy):
    n = SIZES.get(strategy, 2)
    run = overrides(tmp_path, "decoder", "run", "trainer.max_steps=2", f"strategy={strategy}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m", "txtrain", *run]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done:") == 1
    assert f"{strategy}, {n} processes" in done.stdout
    assert [int(row["step"]) for row in read(tmp_path / "run/metrics.csv")] == [1, 2]

"""Signals to the command, from its first moments to its last: what is left goes on as if nothing had happened."""

import json
import os
import pty
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from tests.compose.conftest import ROOT
from tests.training import TINY, rows, weights, write_text
from tests.unit.ground.test_slurm import program
from txtrain.checkpoint import format as checkpoint
from txtrain.parallel.launch import Group


@pytest.fixture
def run(clean_room, monkeypatch):
    """run("key=value", ...) -> the command, begun, in a SLURM job; what scontrol is asked is in `asked`."""
    write_text(clean_room / "text.txt")
    (clean_room / "bin").mkdir()
    program(clean_room / "bin", "scontrol", f'echo "$@" >> {clean_room}/asked')
    program(clean_room / "bin", "squeue", "exit 1")
    environment = os.environ | {"PATH": f"{clean_room}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "OMP_NUM_THREADS": "1"}

    begun = []

    def begin(*overrides, verb=(), program=("-m", "txtrain"), **more):
        command = [sys.executable, *program, *verb, *overrides]
        begun.append(subprocess.Popen(command, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return begun[-1]

    yield begin
    for command in begun:
        command.kill()


def asked(folder):
    return (folder / "asked").read_text().splitlines() if (folder / "asked").exists() else []


def wait_for(there, seconds=300):
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


SLEEPS = "import pathlib, time\npathlib.Path('imported').touch()\ntime.sleep(120)\n"


@pytest.mark.parametrize("more", [(), ("trainer.auto_requeue=false",)], ids=["requeued", "not requeued"])
def test_a_training_that_is_preempted_while_it_imports_ends_at_once_with_75(more, run, clean_room):
    (clean_room / "slow.py").write_text(SLEEPS)
    command = run("imports=[slow.py]", *more)
    wait_for((clean_room / "imported").exists)
    command.send_signal(signal.SIGTERM)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 75, err
    assert "SIGTERM: stopped before the first step." in err
    assert asked(clean_room) == ([] if more else ["requeue 17"])


def test_what_is_no_training_is_ended_by_a_signal_as_ever(run, clean_room):
    (clean_room / "slow.py").write_text(SLEEPS)
    command = run("imports=[slow.py]", verb=["plan"])
    wait_for((clean_room / "imported").exists)
    command.send_signal(signal.SIGTERM)
    command.communicate(timeout=60)
    assert command.returncode == -signal.SIGTERM
    assert asked(clean_room) == []


def test_a_signal_to_the_launcher_waits_for_processes_that_are_just_starting(clean_room):
    begins = """
        import pathlib, time
        pathlib.Path("begun").touch()
        time.sleep(1)
        from txtrain.parallel.early_signals import EndsAtOnce
        EndsAtOnce().__enter__()
        time.sleep(60)
    """
    with Group() as group:
        group.start([sys.executable, "-c", textwrap.dedent(begins)], [dict(os.environ)], held=True)
        wait_for((clean_room / "begun").exists)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert group.wait() == 75


LONG_START = """
    import ctypes, pathlib, sys
    from txtrain.training.data_module import DataModule
    from txtrain.cli.main import main

    def prepare(self):                        # waits for a lock that is never opened, in C, where Python answers no signal
        pathlib.Path("preparing").touch()
        lock = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(lock)

    DataModule.prepare = prepare
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [pytest.param(signal.SIGUSR1, 75, id="USR1"), pytest.param(signal.SIGINT, 1, id="INT", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_start_that_takes_long_is_left_though_python_answers_no_signal(number, code, run, clean_room):
    (clean_room / "long.py").write_text(textwrap.dedent(LONG_START))
    command = run(*TINY, "data.path=text.txt", "run_dir=run", program=("long.py",))
    wait_for((clean_room / "preparing").exists)
    command.send_signal(number)
    _, err = command.communicate(timeout=60)
    assert command.returncode == code, err
    assert err.count("stopped before the first step.") == 1
    assert asked(clean_room) == (["requeue 17"] if code == 75 else [])
    assert not (clean_room / "run").exists()


ENDS_SLOWLY = """
    import atexit, pathlib, time

    def end():
        pathlib.Path("ending").touch()
        time.sleep(2)

    atexit.register(end)
"""


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_signal_after_the_run_is_complete_changes_nothing(n, run, clean_room):
    (clean_room / "late.py").write_text(textwrap.dedent(ENDS_SLOWLY))
    command = run(*TINY, "data.path=text.txt", "imports=[late.py]", "run_dir=run", "trainer.max_steps=2", f"trainer.devices={n}")
    wait_for((clean_room / "ending").exists)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        command.send_signal(number)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 0, err
    assert "txtrain:" not in err
    assert "Traceback" not in err
    assert asked(clean_room) == []


def test_a_terminal_that_is_closed_stops_a_run_with_a_checkpoint(clean_room):
    """SIGHUP, and from then on nothing can be written to the screen, not even by Python's own end."""
    write_text(clean_room / "text.txt")
    more = ("data.path=text.txt", "run_dir=run", "trainer.max_steps=1000000", "trainer.limit_val_batches=0")
    more += ("callbacks.p._target_=talks.Talks", "imports=[talks.py]")
    (clean_room / "talks.py").write_text(TALKS)
    pid, terminal = pty.fork()
    if not pid:
        os.execve(sys.executable, [sys.executable, "-m", "txtrain", *TINY, *more], os.environ | {"OMP_NUM_THREADS": "1"})
    drain = threading.Thread(target=lambda: [None for _ in iter(lambda: read_from(terminal), b"")], daemon=True)
    drain.start()
    try:
        wait_for(lambda: len(rows(clean_room / "run")) > 3)
    finally:
        os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    assert json.loads((clean_room / "run/run.json").read_text())["status"] == "preempted"
    checkpoint.verify(checkpoint.locate(clean_room / "run"))


TALKS = """
import lightning.pytorch

class Talks(lightning.pytorch.Callback):
    def on_exception(self, *_):
        print("the user's own code writes too", flush=True)
"""


def read_from(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def srun_tasks(run, *overrides, **more):
    """Two tasks of one step, as srun would start them."""
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "node1", "SLURM_NODEID": "0", "MASTER_PORT": str(free_port())}
    places = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    return [run(*overrides, **step, **place, **more) for place in places]


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ended(tasks):
    said = [task.communicate(timeout=240) for task in tasks]
    return [task.returncode for task in tasks], said


@pytest.mark.slow
def test_a_signal_to_one_of_sruns_tasks_stops_both_and_requeues_once_and_the_next_start_goes_on(run, clean_room):
    arguments = (*TINY, "data.path=text.txt", "strategy=ddp", "trainer.devices=2", "trainer.limit_val_batches=0", "run_dir=run")
    tasks = srun_tasks(run, *arguments, "trainer.max_steps=1000000")
    wait_for(lambda: len(rows(clean_room / "run")) > 3)
    tasks[1].send_signal(signal.SIGUSR1)
    codes, said = ended(tasks)
    assert codes == [75, 75], said
    assert asked(clean_room) == ["requeue 17"]
    assert said[0][0].count("SLURM runs job 17 again") == 1
    n = len(rows(clean_room / "run"))
    codes, said = ended(srun_tasks(run, *arguments, f"trainer.max_steps={n + 2}", SLURM_RESTART_COUNT="1"))
    assert codes == [0, 0], said
    assert [int(row["step"]) for row in rows(clean_room / "run")] == list(range(1, n + 3))
    codes, said = ended(srun_tasks(run, *arguments, "trainer.num_nodes=2"))
    assert codes == [2, 2]
    assert said[0][1].count("srun --nodes=2 --ntasks-per-node=2") == 1
    assert said[1][1] == ""


# ------------------------------------------------------------------------------------------------------------- random moments

DRIVER = """
    import os, random, signal, sys, time
    from pathlib import Path
    import lightning.pytorch, torch
    from tests.training import tiny
    from txtrain.checkpoint import save as saving
    from txtrain.parallel.early_signals import EndsAtOnce
    from txtrain.training.run import run_train
    import txtrain.training.run

    folder, phase, moments, times = Path(sys.argv[1]), sys.argv[2], random.Random(int(sys.argv[3])), int(sys.argv[4])

    class Phases(lightning.pytorch.Callback):          # a file says what is going on; the sleeps make moments of it
        def setup(self, *args, **kwargs): note("training" if phase != "compile" else "compile")
        def on_train_batch_start(self, *args):         # the first step compiles
            if phase != "compile": note("training")
            time.sleep(0.02)
        def on_train_batch_end(self, *args): note("training")
        def on_validation_start(self, *args): note("validation")
        def on_validation_batch_start(self, *args): time.sleep(0.02)
        def on_validation_end(self, *args): note("training")

    def note(what):
        (folder / "phase.tmp").write_text(what)
        (folder / "phase.tmp").rename(folder / "phase")

    real = saving.save
    def save(*args, **kwargs):
        note("saving")
        time.sleep(0.02)
        real(*args, **kwargs)
        time.sleep(0.02)
        note("training")
    saving.save = save
    txtrain.training.run.instances = lambda *named: [Phases()]

    ANSWERED = {signal.SIGUSR1, signal.SIGTERM}

    class Child:
        def __init__(self, config):
            (folder / "phase").unlink(missing_ok=True)
            signal.pthread_sigmask(signal.SIG_BLOCK, ANSWERED)
            self.code, self.pid = None, os.fork()
            if not self.pid:
                self.run(config)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ANSWERED)

        def run(self, config):
            try:
                sys.argv = ["txtrain"]
                EndsAtOnce().__enter__()                   # as the command does in its first lines
                signal.pthread_sigmask(signal.SIG_UNBLOCK, ANSWERED)
                torch.set_num_threads(1)
                sys.stdout = sys.stderr = open(os.devnull, "w")
                os._exit(run_train(config))
            except BaseException:
                import traceback
                traceback.print_exc(file=open(folder / "error", "w"))
            os._exit(1)

        @property
        def ended(self):
            if self.code is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.code = os.waitstatus_to_exitcode(status) if pid else None
            return self.code is not None

        def wait(self):
            while not self.ended:
                time.sleep(0.001)
            return self.code

        def signal(self, number):
            if not self.ended:
                os.kill(self.pid, number)

        def until(self, there):
            while not there() and not self.ended:
                time.sleep(0.001)

    def now():
        try:
            return (folder / "phase").read_text()
        except FileNotFoundError:
            return "start-up"

    more = ["trainer.max_steps=20", "save.every_n_steps=3", "model.dropout=0.1", "sample.n=1", "sample.max_new_tokens=3", "trainer.log_every_n_steps=1"]
    more += ["trainer.compile=true"] if phase == "compile" else []
    assert Child(tiny(folder, *more, f"run_dir={folder / 'whole'}")).wait() == 0, (folder / "error").read_text()
    spans = {"start-up": 0.3, "training": 0.1, "validation": 0.1, "saving": 0.06}
    if phase == "compile":                             # with the cache that the first has filled, as all others
        child = Child(tiny(folder, *more, f"run_dir={folder / 'again'}"))
        child.until(lambda: now() == "compile")
        start = time.monotonic()
        child.until(lambda: now() == "training")
        spans["compile"] = time.monotonic() - start
        assert child.wait() == 0, (folder / "error").read_text()
    for i in range(times):
        config = tiny(folder, *more, f"run_dir={folder / str(i)}")
        child = Child(config)
        child.until(lambda: now() == phase)
        for _ in range(moments.randrange(3) if phase in ("training", "validation", "saving") else 0):  # another one of that kind
            child.until(lambda: now() != phase)
            child.until(lambda: now() == phase)
        time.sleep(moments.uniform(0, spans[phase]))
        met, numbers = now(), [moments.choice((signal.SIGUSR1, signal.SIGTERM)) for _ in range(moments.randrange(1, 4))]
        for number in numbers:
            child.signal(number)
            time.sleep(moments.uniform(0, 0.05))
        codes = [child.wait()]
        while codes[-1] == 75:
            codes.append(Child(config).wait())
        print(met, [n.name for n in numbers], codes, flush=True)
        assert codes[-1] == 0, (folder / "error").read_text() if (folder / "error").exists() else codes
"""


def at_random_moments(folder, phase, times):
    """Each run is told to stop in that phase, once, and is started again until it is done: it must be the uninterrupted one."""
    seed = random.randrange(10**6)
    write_text(folder / "text.txt")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(folder), phase, str(seed), str(times)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    print(done.stdout)
    assert done.returncode == 0, f"seed {seed}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert done.stdout.count("[75, 0]") >= times // 2, f"seed {seed}: the signals met nothing\n{done.stdout}"
    for i in range(times):
        assert rows(folder / str(i)) == rows(folder / "whole"), f"seed {seed}, run {i}\n{done.stdout}"
        assert weights(folder / str(i)) == weights(folder / "whole"), f"seed {seed}, run {i}\n{done.stdout}"
        assert (folder / str(i) / "samples.txt").read_text() == (folder / "whole/samples.txt").read_text(), f"seed {seed}, run {i}"


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["start-up", "compile", "training", "validation", "saving"])
def test_eight_runs_that_are_told_to_stop_at_random_moments_of_a_phase_equal_the_uninterrupted_one(phase, tmp_path):
    at_random_moments(tmp_path, phase, 8)


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_at_a_random_moment_of_a_save_equals_the_uninterrupted_one(tmp_path):
    at_random_moments(tmp_path, "saving", 2)


@pytest.mark.slow
def test_commands_that_are_told_to_stop_at_random_moments_of_two_processes_lives_equal_the_uninterrupted_one(run, clean_room):
    """From the interpreter's start on, through txtrain's own launcher."""
    arguments = (*TINY, "data.path=text.txt", "strategy=ddp", "trainer.devices=2", "trainer.max_steps=20")
    start = time.monotonic()
    whole = run(*arguments, "run_dir=whole")
    _, err = whole.communicate(timeout=240)
    assert whole.returncode == 0, err
    seconds, moments = time.monotonic() - start, random.Random(seed := random.randrange(10**6))
    for i in range(8):
        command, codes = run(*arguments, f"run_dir={i}"), []
        time.sleep(max(0.6, moments.uniform(i, i + 1) / 8 * seconds))
        command.send_signal(moments.choice((signal.SIGUSR1, signal.SIGTERM)))
        said = command.communicate(timeout=240)
        codes.append(command.returncode)
        while codes[-1] == 75:
            command = run(*arguments, f"run_dir={i}")
            said = command.communicate(timeout=240)
            codes.append(command.returncode)
        assert codes in ([0], [75, 0]), f"seed {seed}: {codes}\n{said[1]}"
        assert len(asked(clean_room)) == (1 if 75 in codes else 0), f"seed {seed}"
        (clean_room / "asked").unlink(missing_ok=True)
        assert rows(clean_room / str(i)) == rows(clean_room / "whole"), f"seed {seed}, run {i}"
        assert weights(clean_room / str(i)) == weights(clean_room / "whole"), f"seed {seed}, run {i}"

"""Start the processes of a run on this machine and wait for them; none outlives the others. No torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from txtrain.errors import ConfigError
from txtrain.ground.files import scratch
from txtrain.ground.orphans import end_with_parent
from txtrain.parallel.early_signals import PREEMPTED, SIGNALS, heard, hung_up, say
from txtrain.parallel.world import STORE, by_srun, started
from txtrain.run_config import RunConfig

USER = 2  # exit code of a user's error; all processes agree on it, as on PREEMPTED
AGREED, GRACE = 600.0, 5.0  # seconds that the others have to end by themselves, once one has ended so, or has failed
STOPPED = 60.0  # seconds for which a process may be stopped (SIGSTOP) while others run
_LOOK = 0.05  # seconds between polls


def n_processes(config: RunConfig) -> int:
    """How many processes to start here: 1 where a launcher (torchrun, srun) has started this one or one suffices.

    Raises:
        ConfigError: the run has several nodes and no launcher; or srun's tasks are not the configured ones.
    """
    if task := by_srun():
        task.check(config.trainer)
    if started():
        return 1
    if config.trainer.num_nodes > 1:
        raise ConfigError(
            "`trainer.num_nodes` must be 1 where txtrain starts the processes itself, "
            f"but is {config.trainer.num_nodes} instead. On each node: torchrun --nnodes N --nproc-per-node DEVICES "
            "--rdzv-backend c10d --rdzv-endpoint HOST:PORT -m txtrain ..., or in a SLURM job "
            f"srun --nodes={config.trainer.num_nodes} --ntasks-per-node=DEVICES txtrain ..."
        )
    devices = config.trainer.devices
    return _n_gpus(config.trainer.accelerator) if devices == "auto" else devices


def _n_gpus(accelerator: str) -> int:
    """The number of GPUs of the machine; 1 on CPU."""
    if accelerator == "cpu" or not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()):
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def python() -> list[str]:
    """The command for this Python, without the current folder among its modules: `-m` puts it first, and a stranger's
    random.py there would run. `imports=` finds the user's files by itself. With it where txtrain itself lies in it.
    """
    of_checkout = Path(__file__).resolve().parents[2] == Path.cwd().resolve()
    return [sys.executable, *([] if of_checkout else ["-P"])]


def launch(config: RunConfig, write: Callable[[Path], None], n: int, verb: str = "train") -> int:
    """Run a verb in n processes; return the exit code of the process that failed first, 0 if none did.

    write: writes the whole configuration to a file, which each process reads.
    """
    with scratch() as folder, Group() as group:
        file = folder / "config.yaml"
        write(file)
        threads = os.environ.get("OMP_NUM_THREADS") or str(
            max(1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) // n)
        )
        common = {
            "TXTRAIN_CONFIG": str(file), STORE: str(folder / "store"), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)
        }
        environments = [
            os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": threads}
            for rank in range(n)
        ]
        # What a signal's handler needs before the file is read (early_signals.py).
        said = [
            f"trainer.max_requeues={config.trainer.max_requeues}", f"resume={config.resume}",
            f"run_dir={config.run_dir or ''}", f"name={config.name}",
            f"trainer.auto_requeue={config.trainer.auto_requeue}",
        ]
        trains = verb == "train"
        group.start([*python(), "-m", "txtrain", verb, *(said if trains else ())], environments, held=trains)
        return group.wait()


class Group:
    """Child processes that end together. Each signal is forwarded to every child once; children of a killed parent end.

    A context manager: signals are handled from before the first child starts until all have ended.
    """

    def __init__(self) -> None:
        self.received = 0  # the last signal, 0: none
        self._children: list[subprocess.Popen[bytes]] = []
        self._still: dict[int, float] = {}  # by child, seconds for which it is stopped while others run
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Group:
        self._before = {number: signal.signal(number, self._forward) for number in heard()}
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        for child in self._children:
            child.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(
        self, command: Sequence[str], environments: Sequence[dict[str, str]], held: bool = False,
        orphaned: signal.Signals = signal.SIGKILL,
    ) -> None:
        """Start a child for each environment.

        Args:
            held: block signals until the command unblocks them (EndsAtOnce): they would kill a starting interpreter.
            orphaned: signal that each child gets when this process ends, by kill -9 too (Linux).
        """
        self._children, self._still, begin = [], {}, partial(_begin, held, orphaned, os.getpid())
        for environment in environments:
            # In a session of its own: else a terminal's Ctrl-C would arrive twice, and the second means "at once".
            self._children.append(subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=begin))
        if self.received:  # between two starts
            self._forward(self.received, None)

    def _forward(self, number: int, _: Any) -> None:
        hung_up(number)
        self.received = number
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)

    def end(self) -> None:
        """Kill all children that run."""
        for child in self._children:
            if child.poll() is None:
                child.kill()

    def wait(self) -> int:
        """The exit code of the process that failed first, 1 if it was killed or stopped, 0 if none failed."""
        first, deadline, left = 0, float("inf"), True
        while left and time.monotonic() < deadline:
            left = any(child.poll() is None for child in self._children)
            if not first and (failed := self._failed()) is not None:
                first, why = failed
                deadline = time.monotonic() + (AGREED if first in (USER, PREEMPTED) else GRACE)
                if why and (not self.received or first not in (1, -self.received)):
                    say(why)
            time.sleep(_LOOK if left else 0)
        self.end()
        return 1 if first < 0 else first

    def _failed(self) -> tuple[int, str] | None:
        """Exit code (below 0: the signal) and message of a failed process, the cause before its consequences."""
        codes = [child.poll() for child in self._children]
        for _, i, code in sorted((code > 0, i, code) for i, code in enumerate(codes) if code):
            others = ": the others are ended." if None in codes else "."
            if code < 0:
                memory = (
                    " (by hand, or by the system where memory ran out: see dmesg)" if code == -signal.SIGKILL else ""
                )
                return code, f"{self._name(i)} was killed by {signal.Signals(-code).name}{memory}{others}"
            return code, (
                f"{self._name(i)} failed with exit code {code}{others}"
                if None in codes and code not in (USER, PREEMPTED) else ""
            )
        stopped = [i for i, child in enumerate(self._children) if codes[i] is None and _stopped(child.pid)]
        waiting = codes.count(None) > len(stopped)  # else the whole run is suspended, which is allowed
        self._still = {i: self._still.get(i, 0.0) + _LOOK for i in stopped if waiting}
        for i, seconds in self._still.items():
            if seconds >= STOPPED:
                number = signal.Signals(_stopped(self._children[i].pid) or signal.SIGSTOP)
                return -number, f"{self._name(i)} has been stopped by {number.name} for {STOPPED:.0f} s: all are ended."
        return None

    def _name(self, i: int) -> str:
        who = f"rank {i}" if len(self._children) > 1 else "the process"
        return f"{who} (pid {self._children[i].pid} on {socket.gethostname()})"


def _stopped(pid: int) -> int:
    """The signal that has stopped a child of this process; 0: it runs, or has ended since it was looked at."""
    if sys.platform != "linux":
        return 0
    try:
        found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    return 0 if found is None else found.si_status


def _begin(held: bool, orphaned: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """In the child, before the command: block signals if held, and arrange to end with the parent."""
    if held:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    end_with_parent(orphaned, parent)

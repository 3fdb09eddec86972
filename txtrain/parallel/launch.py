"""Start the processes of a run on this machine, wait for them, and let none outlive the others. No torch."""

from __future__ import annotations

import ctypes
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
from txtrain.parallel.early_signals import NOT_AGAIN, PREEMPTED, SIGNALS, heard, hung_up, say
from txtrain.parallel.world import STORE, by_srun, started
from txtrain.run_config import RunConfig

USER = 2  # exit code of a mistake; as PREEMPTED, all processes have agreed on it
AGREED, GRACE = 600.0, 5.0  # seconds in which the others may end by themselves, once one has ended so, or has failed
STOPPED = 60.0  # seconds for which a process may be stopped (SIGSTOP) while others wait for it
_LOOK = 0.05  # seconds between two looks
_PR_SET_PDEATHSIG = 1


def n_processes(config: RunConfig) -> int:
    """How many to start here: 1 where a launcher (torchrun, srun) has started this process as one of several, or where one suffices.

    Raises:
        ConfigError: the run is of several nodes, and this process was started alone; or srun has started other tasks than it names.
    """
    if task := by_srun():
        task.check(config.trainer)
    if started():
        return 1
    if config.trainer.num_nodes > 1:
        raise ConfigError(
            f"`trainer.num_nodes` must be 1 where txtrain starts the processes itself, but is {config.trainer.num_nodes} instead. On each node: "
            "torchrun --nnodes N --nproc-per-node DEVICES --rdzv-backend c10d --rdzv-endpoint HOST:PORT -m txtrain ..., or in a SLURM job "
            f"srun --nodes={config.trainer.num_nodes} --ntasks-per-node=DEVICES txtrain ..."
        )
    devices = config.trainer.devices
    return _n_gpus(config.trainer.accelerator) if devices == "auto" else devices


def _n_gpus(accelerator: str) -> int:
    """All GPUs of the machine; 1 without any: a processor is one device."""
    if accelerator == "cpu" or not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()):
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def launch(config: RunConfig, write: Callable[[Path], None], n: int) -> int:
    """Run a `train` job in n processes; its exit code: that of the process which failed first, 0 if none did.

    write: the whole configuration, into a file that each of them reads.
    """
    with scratch() as folder, Group() as group:
        file = folder / "config.yaml"
        write(file)
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) // n))
        common = {"TXTRAIN_CONFIG": str(file), STORE: str(folder / "store"), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
        environments = [os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": threads} for rank in range(n)]
        # The rest is in the file; this must be known before it is read.
        said = [f"trainer.max_requeues={config.trainer.max_requeues}", f"resume={config.resume}", f"run_dir={config.run_dir or ''}"]
        said += [] if config.trainer.auto_requeue else [NOT_AGAIN]
        group.start([sys.executable, "-m", "txtrain", "train", *said], environments, held=True)
        return group.wait()


class Group:
    """Processes that live and die together. A signal to this one reaches each of them once; if this one is killed, they end too.

    `with Group() as group:` owns the signals, from before the first process starts until all have ended.
    """

    def __init__(self) -> None:
        self.received = 0  # the last signal
        self._children: list[subprocess.Popen[bytes]] = []
        self._still: dict[int, float] = {}  # seconds for which a process is stopped and others wait for it
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
        self, command: Sequence[str], environments: Sequence[dict[str, str]], held: bool = False, orphaned: signal.Signals = signal.SIGKILL
    ) -> None:
        """
        Args:
            held: signals wait until the command takes them (EndsAtOnce does): an interpreter that is just starting would die of them.
            orphaned: what each is sent when this process is gone, by kill -9 too (Linux).
        """
        self._children, self._still, begin = [], {}, partial(_begin, held, orphaned, os.getpid())
        for environment in environments:
            # A session of its own: a terminal's Ctrl-C would reach it twice otherwise, and the second one means "at once".
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
        """At once."""
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
        """Exit code (below 0: the signal) of a process that has failed, the cause before its consequences, and what to say of it."""
        codes = [child.poll() for child in self._children]
        for _, i, code in sorted((code > 0, i, code) for i, code in enumerate(codes) if code):
            others = ": the others are ended." if None in codes else "."
            if code < 0:
                memory = " (by hand, or by the system where memory ran out: see dmesg)" if code == -signal.SIGKILL else ""
                return code, f"{self._name(i)} was killed by {signal.Signals(-code).name}{memory}{others}"
            return code, f"{self._name(i)} failed with exit code {code}{others}" if None in codes and code not in (USER, PREEMPTED) else ""
        stopped = [i for i, child in enumerate(self._children) if codes[i] is None and _stopped(child.pid)]
        waiting = codes.count(None) > len(stopped)  # else the whole run is suspended, and nobody waits
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
    """The signal by which a child of this process is stopped; 0: it runs."""
    found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) if sys.platform == "linux" else None
    return 0 if found is None else found.si_status


def _begin(held: bool, orphaned: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """In the new process: it ends with its parent."""
    if held:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, orphaned)
        if parent not in (None, os.getppid()):  # it was gone before
            os.kill(os.getpid(), signal.SIGKILL)

"""Start the processes of a run on this machine, wait for them, and let none outlive the others. No torch."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from txtrain.errors import ConfigError
from txtrain.parallel.early_signals import NOT_AGAIN, PREEMPTED
from txtrain.parallel.world import STORE, by_srun, started
from txtrain.run_config import RunConfig

USER = 2  # exit code of a mistake; as PREEMPTED, all processes have agreed on it
AGREED, GRACE = 600.0, 5.0  # seconds in which the others may end by themselves, once one has ended so, or has failed
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
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
    with tempfile.TemporaryDirectory(prefix="txtrain-") as folder:
        file = Path(folder) / "config.yaml"
        write(file)
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) // n))
        common = {"TXTRAIN_CONFIG": str(file), STORE: str(Path(folder) / "store"), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
        environments = [os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": threads} for rank in range(n)]
        said = [] if config.trainer.auto_requeue else [NOT_AGAIN]  # the rest is in the file; this must be known before it is read
        return Group([sys.executable, "-m", "txtrain", "train", *said], environments, held=True).wait()


class Group:
    """Processes that live and die together. A signal to this one reaches each of them once; if this one is killed, so are they.

    Args:
        held: signals wait until the command takes them (EndsAtOnce does): an interpreter that is just starting would die of them.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[dict[str, str]], held: bool = False) -> None:
        self._received = 0
        self._children: list[subprocess.Popen[bytes]] = []
        self._before = {number: signal.signal(number, self._forward) for number in FORWARDED}
        for environment in environments:
            # A session of its own: a terminal's Ctrl-C would reach it twice otherwise, and the second one means "at once".
            self._children.append(subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=partial(_begin, held)))
        if self._received:  # between two starts
            self._forward(self._received, None)

    def _forward(self, number: int, _: Any) -> None:
        self._received = number
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)

    def end(self) -> None:
        """At once."""
        for child in self._children:
            if child.poll() is None:
                child.kill()

    def wait(self) -> int:
        """The exit code of the process that failed first, 1 if it was killed, 0 if none failed."""
        try:
            return self._wait()
        finally:
            self.end()
            for child in self._children:
                child.wait()
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _wait(self) -> int:
        first, deadline = 0, float("inf")
        while any(child.poll() is None for child in self._children) and time.monotonic() < deadline:
            failed = next((i for i, child in enumerate(self._children) if child.poll() not in (None, 0)), None)
            if failed is not None and not first:
                first = self._children[failed].returncode
                deadline = time.monotonic() + (AGREED if first in (USER, PREEMPTED) else GRACE)
                if first < 0:  # it had no word of its own
                    print(f"txtrain: process {failed} was killed by {signal.Signals(-first).name}: the others are ended.", file=sys.stderr, flush=True)
            time.sleep(0.05)
        first = first or next((child.returncode for child in self._children if child.returncode), 0)
        return 1 if first < 0 else first


def _begin(held: bool) -> None:
    """In the new process: it dies with its parent."""
    if held:
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

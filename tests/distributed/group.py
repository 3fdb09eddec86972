"""Several processes for a test: started together, several cases a launch, ended together; a failure shows the workers' last words."""

from __future__ import annotations

import dataclasses as dc
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from tests.compose.conftest import ROOT
from tests.device import DEVICE, VARIABLE, needs
from txtrain.parallel.launch import Group


@dc.dataclass(frozen=True)
class Case:
    overrides: Sequence[str]
    callbacks: Sequence[str] = ()  # see callbacks.py


def train(cases: Mapping[str, Case], n: int, folder: Path, timeout: float = 240, device: str = DEVICE) -> None:
    """Train every case in the same n processes.

    Raises:
        AssertionError: a process failed, or the time is over; with what the processes wrote last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "cases.json"
    listed.write_text(json.dumps({name: dc.asdict(case) for name, case in cases.items()}))
    run([sys.executable, "-m", "tests.distributed.worker", str(listed)], n, folder, timeout, device=device)


def run(command: Sequence[str], n: int, folder: Path, timeout: float = 240, ends_with: int = 0, device: str = DEVICE) -> str:
    """A command in n processes that find each other as a launcher's would; what they wrote, one after the other."""
    needs(n, device)
    store = folder / f"store-{os.urandom(4).hex()}"
    common = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "TXTRAIN_STORE": str(store), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), VARIABLE: device}
    logs = [folder / f"log-{rank}.txt" for rank in range(n)]
    shell = ["bash", "-c", 'exec "$@" > "$TXTRAIN_TEST_LOG" 2>&1', "bash", *command]
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "TXTRAIN_TEST_LOG": str(logs[rank])} for rank in range(n)]
    with Group() as group:
        group.start(shell, [os.environ | common | place for place in places])
        timer = threading.Timer(timeout, group.end)
        timer.daemon = True  # an interrupt before it is cancelled does not keep the tests waiting
        timer.start()
        try:
            code = group.wait()
        finally:
            timer.cancel()
    said = "\n".join(f"=== process {rank}\n{log.read_text()[-4000:]}" for rank, log in enumerate(logs) if log.exists())
    assert code == ends_with, f"exit code {code}{f', or longer than {timeout} s' if code < 0 or code == 1 else ''}\n{said}"
    return said


def command_line(arguments: Sequence[str], folder: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """txtrain, as typed; it starts the processes itself."""
    needs(max([1, *(int(a.split("=")[1]) for a in arguments if a.startswith("trainer.devices="))]))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "txtrain", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


def as_worker(main: Callable[[], None]) -> None:
    """Run main as one process of a group: where it fails, it ends at once after its traceback, since the others wait for it.

    The group is left before Python ends: gloo's threads would be met by the ends of static objects, and abort.
    """
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

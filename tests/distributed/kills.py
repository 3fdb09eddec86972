"""Runs that are killed at random moments, and continued: `python -m tests.distributed.kills FOLDER SEED KILLS [OVERRIDE ...] then [OVERRIDE ...]`.

Leaves FOLDER/whole, which nobody disturbed, and FOLDER/0, FOLDER/1, ..., each killed once with SIGKILL (all of its processes) and then
continued to its end, every other one with the second overrides on top. Prints, as JSON, for each kill the names of what the run then had under
checkpoints/. Torch is imported once: the processes of the runs are forks.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import lightning.pytorch as pl
import torch

import txtrain.training.run
from tests.training import tiny
from txtrain.config.schema import Train
from txtrain.ground import files
from txtrain.ground.orphans import end_with_parent
from txtrain.parallel.world import STORE

PAUSE = 0.02  # seconds before each step; and a fraction before each file of a save that is forced to the disk: so both are hit


class Begun(pl.Callback):
    """Tells when the first step begins, and makes steps long enough to be hit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, *_: object) -> None:
        self.path.touch()

    def on_train_batch_start(self, *_: object) -> None:
        time.sleep(PAUSE)


class Killed:
    """The processes of one run."""

    def __init__(self, config: Train, begun: Path) -> None:
        self.begun, n = begun, config.trainer.devices
        begun.unlink(missing_ok=True)
        store = begun.with_name(f"store-{os.urandom(4).hex()}")
        self.pids = [self._fork(config, n, rank, store) for rank in range(n)]

    def _fork(self, config: Train, n: int, rank: int, store: Path) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            end_with_parent()
            if n > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), STORE: str(store)}
            torch.set_num_threads(1)
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            _slow_down(PAUSE / 8)
            txtrain.training.run.train(config, callbacks=[Begun(self.begun)] if rank == 0 else [])
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)

    def wait_until_begun(self) -> None:
        while not self.begun.exists():
            ended = [pid for pid in self.pids if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)]
            assert not ended, f"{ended} ended before the first step"
            time.sleep(0.002)

    def wait_for_a_save(self, folder: Path) -> None:
        """Until one is being written, or the run has ended."""
        while not any(folder.glob("checkpoints/*.tmp")) and not os.waitid(os.P_PID, self.pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.0005)

    def kill(self) -> bool:
        """All of them; False: one had come to its end by itself."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)  # a process that has ended keeps its number until it is waited for
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]
        assert all(code in (0, -signal.SIGKILL) for code in codes), codes
        return 0 not in codes

    def wait(self) -> None:
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]
        assert not any(codes), codes


def _slow_down(seconds: float) -> None:
    sync = files.sync

    def slow(path: Path) -> None:
        time.sleep(seconds)
        sync(path)

    files.sync = slow


def main(folder: Path, seed: int, kills: int, overrides: list[str], then: list[str]) -> None:
    moments, begun = random.Random(seed), folder / "begun"

    def config(name: str, *more: str) -> Train:
        return tiny(folder, *overrides, f"run_dir={folder / name}", *more)

    whole = Killed(config("whole"), begun)
    started = time.monotonic()
    whole.wait_until_begun()
    first = time.monotonic()
    whole.wait()
    ready, training = first - started, time.monotonic() - first
    for i in range(kills):
        while True:
            run = Killed(config(str(i)), begun)
            if i % 5 == 4:  # while it starts, or just after
                time.sleep(moments.uniform(0, 1.5 * ready))
            else:
                run.wait_until_begun()
                time.sleep(moments.uniform(0, training))
            if i % 5 == 3:  # chance alone may meet no save where the disk is fast
                run.wait_for_a_save(folder / str(i))
            if run.kill():
                break
            shutil.rmtree(folder / str(i))
        print(json.dumps(sorted(p.name for p in (folder / str(i)).glob("checkpoints/*"))), flush=True)
        Killed(config(str(i), *(then if i % 2 else [])), begun).wait()


if __name__ == "__main__":
    at = sys.argv.index("then")
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:at], sys.argv[at + 1 :])

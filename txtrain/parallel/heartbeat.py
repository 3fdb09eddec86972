"""Ranks that another launcher (torchrun, srun) has started watch each other: one that dies or stands still is named.

Each rank beats every few seconds, from a thread, at the launcher's meeting point (a TCPStore). With a beat travels what
a rank sees of its neighbours, the processes on its machine. Rank 0 looks at all; all look at rank 0 and its neighbours.
A rank is lost if a neighbour sees that it is gone, or that it is stopped while there is no beat of it for a minute; or
if for a minute there is a beat neither of it nor of any neighbour. Then it is named, and all end. A rank that is only
busy, in a call that lets no thread run, is not lost. txtrain's own launcher sees its children itself.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from txtrain.parallel.early_signals import say
from txtrain.parallel.launch import STOPPED

PrefixStore, TCPStore = dist.PrefixStore, dist.TCPStore  # type: ignore[attr-defined]
BEAT = 5.0  # seconds
_STOPPED, _GONE = "stopped", "gone"


class Heartbeat:
    """A context manager, entered by all ranks before they first wait for each other."""

    _entered = itertools.count()  # by this process: a launcher keeps its store for all that its processes do

    def __init__(self, rank: int, size: int, store: Any = None) -> None:
        self.rank, self.size, self.base = rank, size, store or (_meeting_point() if size > 1 else None)
        self._prefix = f"txtrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(self._entered)}"
        self._over = threading.Event()
        self._who: list[tuple[str, int]] = []  # machine and pid of each rank
        self._on: dict[str, list[int]] = {}  # ranks by machine
        self._still: dict[int, float] = {}  # seconds without a beat, of those that this rank looks at
        self._last: dict[int, bytes] = {}
        self._n = 0

    def __enter__(self) -> Heartbeat:
        if self.base is not None:
            store = PrefixStore(self._prefix, self.base)
            store.set(f"who/{self.rank}", json.dumps([f"{socket.gethostname()} {_machine()}", os.getpid()]))
            store.set(f"beat/{self.rank}", "[0, {}]")
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.base is None:
            return
        self._over.set()
        self._thread.join(2 * BEAT)
        with contextlib.suppress(RuntimeError):  # rank 0, where they met, has ended before
            PrefixStore(self._prefix, self.base).set(f"beat/{self.rank}", "")

    def _run(self) -> None:
        """In seconds of this process: while the whole run is suspended none pass."""
        store, failed, last = None, 0.0, time.monotonic()
        while not self._over.wait(BEAT):
            passed, last = min(time.monotonic() - last, 2 * BEAT), time.monotonic()
            try:
                store = store or PrefixStore(self._prefix, _opened(self.base))
                why = self._beat(store, passed)
                failed = 0.0
            except RuntimeError:  # it does not answer, or is gone
                store, failed = None, failed + passed
                where = "the place where all ranks meet (rank 0 under srun, torchrun's first agent)"
                why = f"{where} has not answered for {failed:.0f} s" if failed >= STOPPED else ""
            if why and not self._over.is_set():
                self._end(store, why)

    def _beat(self, store: Any, passed: float) -> str:
        """Tell that this rank is there, and look at others. Returns who is lost, and how; empty: nobody."""
        if not self._who:
            self._know(store)
        ill = {r: state for r in self._beside(self.rank) if (state := _state(self._who[r][1]))}
        self._n += 1
        store.set(f"beat/{self.rank}", json.dumps([self._n, ill]))
        if store.check(["lost"]):
            os._exit(1)
        beats = dict(zip(self._still, store.multi_get([f"beat/{rank}" for rank in self._still]), strict=True))
        for rank, beat in beats.items():
            self._still[rank] = 0.0 if not beat or beat != self._last.get(rank) else self._still[rank] + passed
        self._last = beats
        told = [json.loads(beat)[1] for beat in beats.values() if beat]
        seen = {int(rank): state for one in told for rank, state in one.items()} | ill
        for rank in [rank for rank, beat in beats.items() if beat]:  # the others have ended in order
            if seen.get(rank) == _GONE:
                return f"{self._name(rank)} was killed (by hand, or by the system where memory ran out: see dmesg)"
            if seen.get(rank) == _STOPPED and self._still[rank] >= STOPPED:
                return f"{self._name(rank)} has been stopped by a signal (SIGSTOP) for {self._still[rank]:.0f} s"
            if all(self._still.get(r, 0.0) >= STOPPED for r in (rank, *self._beside(rank))):
                return f"{self._name(rank)} has not answered for {self._still[rank]:.0f} s"
        return ""

    def _know(self, store: Any) -> None:
        """Who is where, and at whom to look."""
        found = store.multi_get([f"who/{rank}" for rank in range(self.size)])
        self._who = [(where, pid) for where, pid in map(json.loads, found)]
        for rank, (where, _) in enumerate(self._who):
            self._on.setdefault(where, []).append(rank)
        looked_at = range(self.size) if self.rank == 0 else (0, *self._beside(0))
        self._still = {rank: 0.0 for rank in looked_at if rank != self.rank}

    def _beside(self, rank: int) -> list[int]:
        """The other ranks on a rank's machine."""
        return [r for r in self._on[self._who[rank][0]] if r != rank]

    def _name(self, rank: int) -> str:
        where, pid = self._who[rank]
        return f"rank {rank} (pid {pid} on {where.split()[0]})"

    def _end(self, store: Any, why: str) -> None:
        """Name the rank, once for all, and end. Whoever holds the store waits until all have read it."""
        told, mine = "", f"{self.rank}: {why}"
        with contextlib.suppress(RuntimeError):
            told = store.compare_set("lost", "", mine).decode() if store is not None else mine
        if told == mine:
            say(f"{why}: all are ended.")
            time.sleep(3 * BEAT if self.rank == 0 else 0)
        os._exit(1)


def _meeting_point() -> Any:
    """The launcher's TCPStore; None: the ranks meet in a file."""
    store = _get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store if isinstance(store, TCPStore) else None


def _opened(store: Any) -> Any:
    """A connection of its own: the rank itself may wait on the other for long."""
    limit = timedelta(seconds=BEAT)
    return TCPStore(store.host, store.port, is_master=False, timeout=limit, wait_for_workers=False)


def _machine() -> str:
    """Identifies the machine and its process numbers: containers may have one host name."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return str(os.getpid())


def _state(pid: int) -> str:
    """Of a process on this machine; empty: it runs."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return _GONE
    return _STOPPED if state in "Tt" else _GONE if state in "ZX" else ""

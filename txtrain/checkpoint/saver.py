"""Writes checkpoints, while the training waits or from a copy in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from txtrain.checkpoint import save as saving
from txtrain.checkpoint.state import RunState


class Saver:
    """Writes one checkpoint at a time; a full disk costs a checkpoint, not the run.

    Args:
        group: the ranks that write together (`OneProcess.checkpoint_group`).
        behind: write from a copy in CPU memory while the training goes on.
        done: called with each complete checkpoint, in the order of their steps.
        warn: told of one that could not be written.
    """

    def __init__(self, group: Any, behind: bool, done: Callable[[Path], None], warn: Callable[[str], None]) -> None:
        self.group, self.behind, self.done, self.warn = group, behind, done, warn
        self.longest = 0.0  # seconds of the longest save; before the first, the owner's estimate
        self._measured = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._copies: Copies | None = None
        if behind and group is not None:  # two threads must not use one group for collectives
            from txtrain.ground.waiting import agreement_group

            self.group = agreement_group()

    def prepare(self, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Allocate the copies' memory in the thread ahead of the first save, which would wait for it. Acts once."""
        if self.behind and self._copies is None:
            self._copies = Copies()
            self._start(partial(self._copies.of, tensors()))  # values may change meanwhile: this copy is not used

    def save(
        self, path: Path, tensors: Mapping[str, Tensor], state: RunState, beside: Callable[[Path], None], must: bool
    ) -> None:
        """Write it, or begin to. must: it is complete on return, or an error is raised; for the last of a run.

        Raises:
            SaveError: with `must`.
        """
        self.wait()
        if must or not self.behind:
            self._write(path, tensors, state, beside, must)
            return
        self._copies = self._copies or Copies()
        copies = self._copies.of(tensors)
        self._start(partial(self._write, path, copies, state, beside, must=False))

    def wait(self) -> None:
        """Wait until nothing is being written. Errors of the thread other than a full disk are raised here."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _start(self, work: Callable[[], object]) -> None:
        self._thread = threading.Thread(target=self._try, args=(work,), name="checkpoint", daemon=False)
        self._thread.start()

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as e:  # raised by `wait` in the main thread
            self._error = e

    def _write(
        self, path: Path, tensors: Mapping[str, Tensor], state: RunState, beside: Callable[[Path], None], must: bool
    ) -> None:
        try:
            begun = time.monotonic()
            saving.save(path, tensors, state, beside, self.group)
            seconds = time.monotonic() - begun
            self.longest, self._measured = max(self.longest, seconds) if self._measured else seconds, True
        except saving.SaveError as e:
            if must:
                raise
            self.warn(f"{path.name} could not be saved ({e}): the run goes on, and older checkpoints are intact.")
            return
        self.done(path)


class Copies:
    """Copies in CPU memory; of a sharded tensor this rank's shard. Their memory is reused: allocating it takes longer
    than copying."""

    def __init__(self) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        gpu = torch.cuda.is_available()  # pinned memory: at full bus speed, all copies asynchronous, then waited for
        self._stager = DefaultStager(StagingOptions(
            use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu
        ))

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Overwrites the copies made before."""
        copies: Any = self._stager.stage(dict(tensors))
        return dict(copies)

"""When a checkpoint is written: while the training waits, or behind its back from a copy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint.state import RunState


class Saver:
    """Writes one checkpoint after the other; a full disk costs a checkpoint, not the run.

    Args:
        group: the processes that write together (`OneProcess.checkpoint_group`).
        behind: go on training while a copy in the processor's memory is written.
        done: called with each checkpoint that is complete, in the order of their steps.
        warn: told of one that could not be written.
    """

    def __init__(self, group: Any, behind: bool, done: Callable[[Path], None], warn: Callable[[str], None]) -> None:
        self.group, self.behind, self.done, self.warn = group, behind, done, warn
        self.longest = 0.0  # seconds that a save took; before the first what its owner expects
        self._measured = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._copies: Copies | None = None
        if behind and group is not None:  # collectives of two threads must not meet in one group
            import torch.distributed as dist

            self.group = dist.new_group(backend="gloo")

    def prepare(self, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Where checkpoints are written behind the training, take the memory of the copies beside it too, once: the first save would wait for it."""
        if self.behind and self._copies is None:
            self._copies = Copies()
            self._start(partial(self._copies.of, tensors()))  # of values that change meanwhile: nobody reads them

    def save(self, path: Path, tensors: Mapping[str, Tensor], state: RunState, beside: Callable[[Path], None], must: bool) -> None:
        """Write it, or begin to. must: be done when this returns, and raise where it cannot be: nothing comes after it.

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
        """Until nothing is being written. What the thread met that was no full disk is raised here."""
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
        except BaseException as e:  # the border of the thread: `wait` raises it where it is seen
            self._error = e

    def _write(self, path: Path, tensors: Mapping[str, Tensor], state: RunState, beside: Callable[[Path], None], must: bool) -> None:
        try:
            begun = time.monotonic()
            checkpoint.save(path, tensors, state, beside, self.group)
            seconds = time.monotonic() - begun
            self.longest, self._measured = max(self.longest, seconds) if self._measured else seconds, True
        except checkpoint.SaveError as e:
            if must:
                raise
            self.warn(f"{path.name} could not be saved ({e}): the run goes on, older checkpoints are as they were.")
            return
        self.done(path)


class Copies:
    """In the processor's memory; of a tensor that lies over processes this one's part. The memory is kept and used again: to get it from the
    system takes longer than to copy."""

    def __init__(self) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        gpu = torch.cuda.is_available()  # pinned memory: at the full speed of the bus, all copies under way at once and then waited for
        self._stager = DefaultStager(StagingOptions(use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu))

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those that were made before change with it."""
        copies: Any = self._stager.stage(dict(tensors))
        return dict(copies)

"""Checksums of tensors, computed beside the reading and writing of what follows."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import torch
import xxhash
from torch import Tensor

NONE_YET = xxhash.xxh3_64_hexdigest(b"")
_SMALL = 1 << 17  # bytes that are hashed sooner than handed over


class Checksum:
    """XXH3 of a tensor's bytes, which come in contiguous pieces of CPU memory that stay unchanged until it is asked."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_64()
        self._last: Future[None] | None = None

    def update(self, piece: Tensor) -> None:
        data = piece.view(torch.uint8).numpy().data
        if self._last is None and len(data) < _SMALL:
            self._digest.update(data)
        else:
            self._last = _thread(os.getpid()).submit(self._digest.update, data)  # one thread: in this order

    def hexdigest(self) -> str:
        if self._last is not None:
            self._last.result()
        return self._digest.hexdigest()


@lru_cache(maxsize=1)
def _thread(pid: int) -> ThreadPoolExecutor:
    """pid: this process's; a fork has none of its parent's threads."""
    return ThreadPoolExecutor(1, "txtrain-checksum")

"""Weights in files that a running training may remove: one checkpoint for all ranks, and what is said of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from txtrain.checkpoint.base import resolve
from txtrain.checkpoint.load import open_weights
from txtrain.config.schema_of_trained import OnTrained
from txtrain.errors import ConfigError
from txtrain.hf.pieces import Source
from txtrain.parallel.one_process import OneProcess

T = TypeVar("T")
_PATIENCE = 60.0  # seconds; for so long NFS may not show a new file to another host


def opened_alike(
    parallel: OneProcess, newest: Callable[[], Path], opened: Callable[[Path], Source], told: Callable[[Path], T]
) -> tuple[Source, T]:
    """The weights, still in their files, of the checkpoint or folder that is the newest on the first rank, and what
    that rank tells of it. Where it is removed meanwhile, of the one that is the newest then.

    Raises:
        ConfigError: there are none, or they cannot be read, or not by all ranks.
    """
    seen, deadline = Path(), 0.0

    def chosen() -> Path:
        nonlocal seen, deadline
        if (where := newest()) != seen:
            seen, deadline = where, time.monotonic() + _PATIENCE
        elif time.monotonic() > deadline:
            raise ConfigError(f"{where} must be on a file system that all processes share, but one does not find it.")
        else:
            time.sleep(0.5)
        return where

    def tried(where: Path) -> tuple[Source, T | None] | None:
        """None if it has been removed."""
        try:
            return opened(where), told(where) if parallel.is_first else None
        except Exception:  # whatever a reader meets where files vanish under it; all else is raised
            if where.exists():
                raise
            return None

    while True:
        where = parallel.first(chosen)
        found = parallel.together(partial(tried, where))
        if not parallel.any(found is None) and found is not None:
            break
        if found is not None:
            found[0].close()
    source, said = found
    return source, parallel.first(lambda: cast(T, said))


def trained_weights(cfg: OnTrained, parallel: OneProcess, told: Callable[[Path], T]) -> tuple[Source, T]:
    """The weights of cfg.checkpoint, still in their files, on all ranks of the same one; and what is told of it."""
    where, finite, (rank, size, *_) = cfg.checkpoint, not cfg.allow_nonfinite, parallel.world
    assert where is not None

    def read(path: Path) -> Source:
        source = open_weights(path, "checkpoint", finite, rank, size, cfg.weights)
        parallel.check_read(source.model.config, "checkpoint")
        return source

    return opened_alike(parallel, lambda: resolve(where, "checkpoint"), read, told)

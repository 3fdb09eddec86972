"""The last step in W&B's files of a run.

The client writes records to `run-ID.wandb`: a header of seven bytes, then LevelDB's log format, blocks of 32 KiB in
which a record may have several fragments (https://github.com/google/leveldb/blob/main/doc/log_format.md), each record a
`Record` of the package's wandb_internal.proto. Blocks are written when they are full: a killed process loses the last.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER, _FRAGMENT = 32768, 7, struct.Struct("<IHB")  # a fragment's checksum, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def last_step(folder: Path, run_id: str) -> int | None:
    """The last step over all processes that wrote for the run; None: it has no row. folder: W&B's, named `wandb`."""
    steps = [step for file in folder.glob(f"*run-*/run-{run_id}.wandb") for step in _steps(file)]
    return max(steps, default=None)


def is_written(file: Path, patience: float) -> bool:
    """Whether a finished run's file is complete within `patience` seconds: it is written after `finish` returns."""
    deadline = time.monotonic() + patience
    while not (file.exists() and any(record.WhichOneof("record_type") == "exit" for record in _last(file))):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _last(file: Path, blocks: int = 4) -> Iterator[Any]:
    """The messages that begin in the last blocks of a file."""
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        at = stream.seek(max(0, size // _BLOCK - blocks + 1) * _BLOCK)
        return _parsed(records(stream.read(), at=_HEADER if at == 0 else 0))


def _parsed(found: Iterator[bytes]) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # its classes are made at run time
    return (messages.Record.FromString(data) for data in found)


def _steps(file: Path) -> Iterator[int]:
    for record in _parsed(records(file.read_bytes())):
        if record.WhichOneof("record_type") == "history":
            items = {(item.key or ".".join(item.nested_key)): item.value_json for item in record.history.item}
            yield int(json.loads(items["_step"])) if "_step" in items else record.history.step.num


def records(data: bytes, at: int = _HEADER) -> Iterator[bytes]:
    """The records that begin in `data` (whole blocks), up to the first incomplete one. at: of the first fragment."""
    parts: list[bytes] | None = None  # None: the record began before
    while at + _FRAGMENT.size <= len(data):
        if _BLOCK - at % _BLOCK < _FRAGMENT.size:  # the rest of the block is too short for a header
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = _FRAGMENT.unpack_from(data, at)
        at += _FRAGMENT.size
        if not _FULL <= kind <= _LAST or at + length > len(data):
            return
        if kind in (_FULL, _FIRST):
            parts = []
        if parts is not None:
            parts.append(data[at : at + length])
            if kind in (_FULL, _LAST):
                yield b"".join(parts)
        at += length

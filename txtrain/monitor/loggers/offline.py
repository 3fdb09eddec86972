"""The last step in the files that W&B keeps of a run.

The client writes a run's records to `run-ID.wandb`: seven bytes of header, then LevelDB's log format, blocks of 32 KiB in which a
record may lie in several fragments (https://github.com/google/leveldb/blob/main/doc/log_format.md), each record a `Record` of the
package's wandb_internal.proto. Its blocks reach the disk when they are full: a process that is killed loses the last one.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER, _FRAGMENT = 32768, 7, struct.Struct("<IHB")  # of a fragment: checksum, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def last_step(folder: Path, run_id: str) -> int | None:
    """Of all processes that wrote for the run; None: no row of it is there. folder: W&B's, `wandb` by name."""
    steps = [step for file in folder.glob(f"*run-*/run-{run_id}.wandb") for step in _steps(file)]
    return max(steps, default=None)


def is_written(file: Path, patience: float) -> bool:
    """Whether a run that was finished is in its file to the end, after at most so many seconds: the service writes it after `finish` has returned."""
    deadline = time.monotonic() + patience
    while not (file.exists() and any(record.WhichOneof("record_type") == "exit" for record in _last(file))):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _last(file: Path, blocks: int = 4) -> Iterator[Any]:
    """The messages that begin in the last blocks."""
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        at = stream.seek(max(0, size // _BLOCK - blocks + 1) * _BLOCK)
        return _parsed(records(stream.read(), at=_HEADER if at == 0 else 0))


def _parsed(found: Iterator[bytes]) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # made at run time
    return (messages.Record.FromString(data) for data in found)


def _steps(file: Path) -> Iterator[int]:
    for record in _parsed(records(file.read_bytes())):
        if record.WhichOneof("record_type") == "history":
            items = {(item.key or ".".join(item.nested_key)): item.value_json for item in record.history.item}
            yield int(json.loads(items["_step"])) if "_step" in items else record.history.step.num


def records(data: bytes, at: int = _HEADER) -> Iterator[bytes]:
    """The records of a log that begin in it, up to the first that is not whole. at: where its first fragment lies; data begins with a block."""
    parts: list[bytes] | None = None  # None: the record began before
    while at + _FRAGMENT.size <= len(data):
        if _BLOCK - at % _BLOCK < _FRAGMENT.size:  # a block's end that no header fits into
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

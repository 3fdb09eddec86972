"""The last step in the files that W&B keeps of a run.

The client writes a run's records to `run-ID.wandb`: seven bytes of header, then LevelDB's log format, blocks of 32 KiB in which a
record may lie in several fragments (https://github.com/google/leveldb/blob/main/doc/log_format.md), each record a `Record` of the
package's wandb_internal.proto. Its blocks reach the disk when they are full: a process that is killed loses the last one.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER, _FRAGMENT = 32768, 7, struct.Struct("<IHB")  # of a fragment: checksum, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def last_step(folder: Path, run_id: str) -> int | None:
    """Of all processes that wrote for the run; None: no row of it is there. folder: W&B's, `wandb` by name."""
    steps = [step for file in folder.glob(f"*run-*/run-{run_id}.wandb") for step in _steps(file)]
    return max(steps, default=None)


def _steps(file: Path) -> Iterator[int]:
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # made at run time
    for data in records(file.read_bytes()):
        record = messages.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {(item.key or ".".join(item.nested_key)): item.value_json for item in record.history.item}
            yield int(json.loads(items["_step"])) if "_step" in items else record.history.step.num


def records(data: bytes) -> Iterator[bytes]:
    """The records of a log, up to the first that is not whole."""
    at = _HEADER
    parts: list[bytes] = []
    while at + _FRAGMENT.size <= len(data):
        if _BLOCK - at % _BLOCK < _FRAGMENT.size:  # a block's end that no header fits into
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = _FRAGMENT.unpack_from(data, at)
        at += _FRAGMENT.size
        if not _FULL <= kind <= _LAST or at + length > len(data):
            return
        parts = [*([] if kind in (_FULL, _FIRST) else parts), data[at : at + length]]
        at += length
        if kind in (_FULL, _LAST):
            yield b"".join(parts)

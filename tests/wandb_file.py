"""What W&B's client left in its files of offline runs, read back: the client of today brings no reader in Python.

A file is seven bytes (":W&B", a magic number, a version), then LevelDB's log: blocks of 32 KiB of fragments, each with its checksum
(of kind and data), length and kind (1 whole, 2 first, 3 middle, 4 last). A whole record is a `Record` of wandb_internal.proto.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record


class WandbFile:
    """Attributes: config, summary, history (rows in order), steps, metrics ({name or glob: x-axis}), name, project, exit_code, preempted."""

    def __init__(self, path: Path) -> None:
        self.path, self.id = path, path.stem.removeprefix("run-")
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.metrics: dict[str, str] = {}
        self.artifacts: list[tuple[str, str, list[str]]] = []  # name, type, aliases in order
        self.name = self.project = self.group = self.entity = ""
        self.tags: list[str] = []
        self.exit_code: int | None = None
        self.preempted = False
        for data in _records(path.read_bytes()):
            self._take(Record.FromString(data))

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.history]

    def _take(self, record: Any) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            self.name, self.project, self.group, self.entity, self.tags = run.display_name, run.project, run.run_group, run.entity, list(run.tags)
            self.config |= _values(run.config.update)
        elif kind == "config":
            self.config |= _values(record.config.update)
        elif kind == "summary":
            self.summary |= _values(record.summary.update)
        elif kind == "history":
            self.history.append(_values(record.history.item))
        elif kind == "metric":
            self.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            self.artifacts.append((record.artifact.name, record.artifact.type, sorted(record.artifact.aliases)))
        elif kind == "preempting":
            self.preempted = True
        elif kind == "exit":
            self.exit_code = record.exit.exit_code


def wandb_files(folder: Path) -> list[WandbFile]:
    """Those below `folder`, one a process, oldest first."""
    return [WandbFile(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def _values(items: Any) -> dict[str, Any]:
    return {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    whole = b""
    for start in range(0, len(data), 32768):
        block, at = data[start : start + 32768], 0 if start else 7
        while at + 7 <= len(block):
            checksum, length, kind = struct.unpack("<IHB", block[at : at + 7])
            content = block[at + 7 : at + 7 + length]
            if kind == 0 or len(content) < length:  # the file of a process that was killed
                return
            assert zlib.crc32(bytes([kind]) + content) == checksum, f"byte {start + at}"
            whole = content if kind in (1, 2) else whole + content
            at += 7 + length
            if kind in (1, 4):
                yield whole

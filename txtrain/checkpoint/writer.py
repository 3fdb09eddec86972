"""Writes the files of torch.distributed.checkpoint's (DCP's) safetensors storage tensor by tensor.

DCP's own writer holds all tensors of a process, copies each into bytes and joins them before it writes: three times the
memory of what it saves, and two to five times the time of torch.save. Here one tensor at a time is brought to the CPU
and written from where it lies. Any reader of safetensors reads the file: its header names each tensor's type, shape and
place, and its offsets in the whole. Under `txtrain` it has the checkpoint's id, its step and each tensor's checksum.
"""

from __future__ import annotations

import dataclasses as dc
import itertools
import json
import os
import secrets
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import _hf_utils as words
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from txtrain.checkpoint.state import ShardState
from txtrain.ground import files
from txtrain.hf.tensor_file import pieces
from txtrain.hf.tensor_names import CHECKSUMS

_TYPES = {dtype: name for name, dtype in words.DTYPE_MAP.items()}
_NONE_YET = xxhash.xxh3_64_hexdigest(b"")


class Writer(HuggingFaceStorageWriter):
    """Writes one file on each rank, with the shards that DCP's plan gives it."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.step, self.id = step, secrets.token_hex(8)  # the plan brings the first rank's id to all ranks

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        made = super().prepare_global_plan(plans)
        return [dc.replace(plan, storage_data={**plan.storage_data, "id": self.id}) for plan in made]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        if plan.items:
            name = words._gen_file_name(1, 1, plan.storage_data["shard_index"])
            # Largest elements first: each tensor begins at a multiple of its element's size, as memory mapping needs.
            items = sorted(plan.items, key=lambda item: (-_dtype(item).itemsize, item.index.fqn))
            checksums = {item.index.fqn: _NONE_YET for item in items}
            ours = ShardState(id=plan.storage_data["id"], step=self.step, checksums=checksums)
            described = _described(items)
            with open(Path(self.path) / name, "wb") as stream:
                header = _header(described, ours)
                files.reserve(stream.fileno(), len(header) + sum(map(_size, items)))
                stream.write(header)
                for item in items:
                    result, checksums[item.index.fqn] = _write(stream, item, planner.resolve_data(item), name)
                    results.append(result)
                stream.seek(0)
                stream.write(_header(described, ours))  # as long as before
                stream.flush()
                os.fsync(stream.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _described(items: list[WriteItem]) -> str:
    """The header's JSON up to what this project adds to its metadata, which stands last."""
    ends = list(itertools.accumulate(_size(item) for item in items))
    entries: dict[str, Any] = {
        item.index.fqn: {
            words.DTYPE_KEY: _TYPES[_dtype(item)], words.SHAPE_KEY: list(_shape(item)),
            words.DATA_OFFSETS_KEY: [end - _size(item), end],
        }
        for item, end in zip(items, ends, strict=True)
    }
    assert len(entries) == len(items), "two parts of one tensor in one file: the format names a tensor once"
    parts = {item.index.fqn: {words.SAVED_OFFSETS_KEY: list(_part(item).offsets)} for item in items}
    entries[words.DEFAULT_EXTRA_METADATA_KEY] = {
        words.CUSTOM_METADATA_KEY: json.dumps(parts),
        words.DCP_VERSION_KEY: str(words.HF_DCP_VERSION),
        words.FORMAT_KEY: words.FORMAT_VALUE,
    }
    return json.dumps(entries).removesuffix("}}")


def _header(described: str, ours: ShardState) -> bytes:
    text = f"{described}, {json.dumps(CHECKSUMS)}: {json.dumps(ours.to_json())}}}}}".encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write(stream: BinaryIO, item: WriteItem, found: Any, name: str) -> tuple[WriteResult, str]:
    """Returns where it was written, and its checksum."""
    tensor: Tensor = found.detach().cpu().contiguous()
    assert (tensor.dtype, tensor.shape) == (_dtype(item), _shape(item)), item.index
    begin, digest = stream.tell(), xxhash.xxh3_64()
    for data in pieces(tensor):
        digest.update(data)  # and what is copied next is in the CPU's cache
        stream.write(data)
    lies = _StorageInfo(name, begin, stream.tell() - begin)
    return WriteResult(index=item.index, size_in_bytes=_size(item), storage_data=lies), digest.hexdigest()


def _dtype(item: WriteItem) -> torch.dtype:
    assert item.tensor_data is not None, item
    return item.tensor_data.properties.dtype


def _part(item: WriteItem) -> Any:
    assert item.tensor_data is not None, item
    return item.tensor_data.chunk


def _shape(item: WriteItem) -> torch.Size:
    return torch.Size(_part(item).sizes)


def _size(item: WriteItem) -> int:
    return _shape(item).numel() * _dtype(item).itemsize

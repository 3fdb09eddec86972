"""Reads what `writer` wrote straight into place, and checks it on the way.

DCP's own reader copies each tensor out of a mapped file, then into the model. Here a tensor that is wanted whole goes
from the file to its place a megabyte at a time, and is compared with its checksum and checked for NaN while in cache.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses as dc
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import _hf_utils as words
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from txtrain.checkpoint.state import ShardState
from txtrain.errors import ConfigError
from txtrain.ground.plain_files import parse_json
from txtrain.hf.pieces import Box, Piece, is_finite
from txtrain.hf.tensor_file import SafetensorsFile

WEIGHTS = ("model.", "ema.")


class NotFiniteError(ConfigError):
    """Weights that hold NaN or infinity. problems: their names."""


@dc.dataclass(frozen=True)
class Headers:
    """What the headers of a checkpoint's shards say. files, checksums: by path."""

    files: dict[str, SafetensorsFile]
    checksums: dict[str, dict[str, str]]
    metadata: Metadata


def read_headers(folder: Path) -> Headers:
    """The headers, parsed once while the files are unchanged: they may be long, and a start asks for them ten times.

    Raises:
        ConfigError: one of them is damaged.
    """
    stats = [(path, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
    return parse_headers(tuple((str(path), s.st_size, s.st_mtime_ns, s.st_ino) for path, s in stats))


@lru_cache(maxsize=1)
def parse_headers(shards: tuple[tuple[str, int, int, int], ...]) -> Headers:
    """shards: path, size, time of change and inode of each file."""
    made, found, places = Headers({}, {}, Metadata({})), dict[str, TensorStorageMetadata](), dict[MetadataIndex, str]()
    for path, *_ in shards:
        file = made.files[path] = SafetensorsFile(Path(path))
        made.checksums[path] = ShardState.of(file.metadata, f"The header of {file.path.name}").checksums
        for name, offsets, shape, dtype in _parts(file):
            held = found.setdefault(name, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), []))
            held.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape)))
            ends = [o + n for o, n in zip(offsets, shape, strict=True)]
            held.size = torch.Size(map(max, ends, held.size))
            places[MetadataIndex(name, offsets)] = path
    return dc.replace(made, metadata=Metadata(dict(found), storage_data=places))


class Reader(HuggingFaceStorageReader):
    """verify: compare each tensor with its checksum. finite: refuse weights that hold NaN or infinity."""

    def __init__(self, folder: Path, verify: bool = True, finite: bool = True) -> None:
        super().__init__(str(folder))
        self.verify, self.finite = verify, finite
        self._headers = read_headers(folder)

    def read_metadata(self) -> Metadata:
        """The shards of each tensor, from the headers."""
        return dc.replace(self._headers.metadata, storage_meta=StorageMeta(load_id=self.load_id))

    def pieces(self, prefix: str) -> list[Piece]:
        """Of the tensors whose names begin with the prefix, named without it; for a reader that needs no plan."""
        found, headers = [], self._headers
        for index, path in (headers.metadata.storage_data or {}).items():
            if index.fqn.startswith(prefix):
                file, name = headers.files[path], index.fqn
                look = partial(self._read, path, name, None)
                shape, read = file.entries[name].shape, partial(_box, file, name)
                found.append(Piece(name.removeprefix(prefix), tuple(index.offset or ()), shape, read, look))
        return found

    def hold(self) -> Callable[[], None]:
        """Keep the shards open, so that `pieces` can be read even if the run removes the checkpoint meanwhile.

        Returns:
            What closes them.
        """
        files = {path: copy.copy(file) for path, file in self._headers.files.items()}  # the headers are cached
        self._headers = dc.replace(self._headers, files=files)
        with contextlib.ExitStack() as opened:
            for file in files.values():
                file.hold()
                opened.callback(file.release)
            return opened.pop_all().close

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Read tensors in place without a plan, for a rank that reads alone.

        Raises:
            ConfigError, NotFiniteError: as `read_data`; ConfigError: the files no longer hold all of a tensor.
        """
        strange, lacking = set(), Counter({name: target.numel() for name, target in into.items()})
        with contextlib.ExitStack() as held:
            held.callback(self.hold())  # each file is opened once
            for index, path in (self._headers.metadata.storage_data or {}).items():
                if (target := into.get(index.fqn)) is not None:
                    part, shape = target.detach(), self._headers.files[path].entries[index.fqn].shape
                    for dim, (begin, n) in enumerate(zip(index.offset or (), shape, strict=True)):
                        part = part if n == part.shape[dim] else part.narrow(dim, begin, n)
                    if not self._read(path, index.fqn, part, self.finite and index.fqn.startswith(WEIGHTS)):
                        strange.add(index.fqn)
                    lacking[index.fqn] -= part.numel()
        if name := next((name for name, n in lacking.items() if n), None):  # a run that goes on may remove it meanwhile
            raise ConfigError(f"the files no longer hold all of {name}")
        if strange:
            raise NotFiniteError(*strange)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Shards that no rank reads whole (their number has changed) are divided over the ranks to be verified."""
        if not self.verify:
            return plans
        items = [item for plan in plans for item in plan.items]
        rest = {item.storage_index for item in items} - {item.storage_index for item in items if self._whole(item)}
        turns = sorted(rest, key=lambda index: (index.fqn, tuple(index.offset or ())))
        return [dc.replace(plan, storage_data=turns[i :: len(plans)]) for i, plan in enumerate(plans)]

    def _whole(self, item: ReadItem) -> bool:
        index = item.storage_index
        return tuple(item.lengths) == self._headers.files[self.storage_data[index]].entries[index.fqn].shape

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Raises:
        ConfigError: a tensor has changed since it was written. NotFiniteError: weights hold NaN or infinity.
        """
        from safetensors import safe_open

        strange = []
        for item in plan.items:
            target, index = planner.resolve_tensor(item).detach(), item.storage_index
            path, name = self.storage_data[index], index.fqn
            check = self.finite and name.startswith(WEIGHTS)
            if self._whole(item):
                fine = self._read(path, name, target, check)
            else:
                with safe_open(path, "pt") as f:
                    part = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                    target.copy_(f.get_slice(name)[part])
                fine = not check or is_finite(target)
            strange += [] if fine else [name]
            planner.commit_tensor(item, target)
        for index in plan.storage_data or ():
            self._read(self.storage_data[index], index.fqn, None, finite=False)
        if strange:
            raise NotFiniteError(*strange)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, path: str, name: str, target: Tensor | None, finite: bool) -> bool:
        """Read one shard into its place (None: nowhere). Returns whether its numbers are finite, if that is asked."""
        file, fine = self._headers.files[path], True
        entry, checksum = file.entries[name], self._headers.checksums[path].get(name) if self.verify else None
        dtype = words.DTYPE_MAP[entry.dtype]
        direct = target is not None and target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()
        held = target if target is not None and direct else torch.empty(entry.shape, dtype=dtype, device="cpu")
        digest = xxhash.xxh3_64()
        for data in file.fill(name, held):
            if checksum is not None:
                digest.update(data)
            fine = fine and (not finite or is_finite(torch.frombuffer(data, dtype=dtype)))
        if checksum is not None and digest.hexdigest() != checksum:
            raise ConfigError(f"{file.path.name}: {name} is not what was written: its checksum is another")
        if target is not None and not direct:
            target.copy_(held)
        return fine


def _box(file: SafetensorsFile, name: str, box: Box) -> Tensor:
    found = file.read(name, *box[:1])
    for dim, (first, last) in enumerate(box[1:], start=1):
        found = found.narrow(dim, first, last - first)
    return found


def _parts(file: SafetensorsFile) -> Iterator[tuple[str, list[int], tuple[int, ...], torch.dtype]]:
    """Of each tensor in a file: its name, its shard's offsets in the whole, shape and type."""
    where = f"The header of {file.path.name}"
    metadata = file.metadata if isinstance(file.metadata, dict) else {}
    text = metadata.get(words.CUSTOM_METADATA_KEY)
    places = {} if text is None else parse_json(str(text), where)
    for name, entry in file.entries.items():
        place = places.get(name) if text is not None else {words.SAVED_OFFSETS_KEY: [0] * len(entry.shape)}
        offsets: Any = place.get(words.SAVED_OFFSETS_KEY) if isinstance(place, dict) else None
        sound = (
            isinstance(offsets, list) and len(offsets) == len(entry.shape)
            and all(type(o) is int and 0 <= o < 2**63 for o in offsets)
        )
        if (
            not sound or entry.dtype not in words.DTYPE_MAP
            or any(o + n >= 2**63 for o, n in zip(offsets, entry.shape, strict=True))
        ):
            raise ConfigError(f"{where}: {name} must be a part of a tensor, but is {entry} at {json.dumps(place)[:80]}")
        yield name, offsets, entry.shape, words.DTYPE_MAP[entry.dtype]

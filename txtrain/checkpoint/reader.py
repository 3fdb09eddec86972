"""Reads what `writer` wrote straight into place, and checks it on the way.

DCP's own reader copies each tensor out of a mapped file, then into the model. Here a tensor that is wanted whole goes
from the file to its place a megabyte at a time, and is compared with its checksum and checked for NaN while in cache.
A rank that reads alone needs no DCP, whose import takes half as long as torch's; `planned` is for those that read
together.
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

from txtrain.checkpoint.state import ShardState
from txtrain.errors import ConfigError
from txtrain.ground.plain_files import parse_json
from txtrain.hf.name_map import Shape
from txtrain.hf.pieces import Box, Piece, is_finite
from txtrain.hf.tensor_file import NUMBERS, SafetensorsFile

SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # DCP's words, in a file's metadata
WEIGHTS = ("model.", "ema.")


class NotFiniteError(ConfigError):
    """Weights that hold NaN or infinity. problems: their names."""


@dc.dataclass(frozen=True)
class Headers:
    """What the headers of a checkpoint's shards say.

    Attributes:
        files, checksums: by path.
        shapes, dtypes: of whole tensors, by name.
        parts: name and offsets of each part -> the path of its file.
    """

    files: dict[str, SafetensorsFile] = dc.field(default_factory=dict)
    checksums: dict[str, dict[str, str]] = dc.field(default_factory=dict)
    shapes: dict[str, Shape] = dc.field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = dc.field(default_factory=dict)
    parts: dict[tuple[str, Shape], str] = dc.field(default_factory=dict)


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
    made = Headers()
    for path, *_ in shards:
        file = made.files[path] = SafetensorsFile(Path(path))
        made.checksums[path] = ShardState.of(file.metadata, f"The header of {file.path.name}").checksums
        for name, offsets, shape, dtype in _parts(file):
            ends = tuple(o + n for o, n in zip(offsets, shape, strict=True))
            known = made.shapes.get(name)
            made.shapes[name] = ends if known is None else tuple(map(max, ends, known))
            made.dtypes.setdefault(name, dtype)
            made.parts[name, tuple(offsets)] = path
    return made


class Reader:
    """verify: compare each tensor with its checksum. finite: refuse weights that hold NaN or infinity."""

    def __init__(self, folder: Path, verify: bool = True, finite: bool = True) -> None:
        self.folder, self.verify, self.finite = folder, verify, finite
        self.headers = read_headers(folder)

    def pieces(self, prefix: str) -> list[Piece]:
        """Of the tensors whose names begin with the prefix, named without it; for a reader that needs no plan."""
        found = []
        for (name, offsets), path in self.headers.parts.items():
            if name.startswith(prefix):
                file, look = self.headers.files[path], partial(self.read_part, path, name, None)
                shape, read = file.entries[name].shape, partial(_box, file, name)
                found.append(Piece(name.removeprefix(prefix), offsets, shape, read, look))
        return found

    def hold(self) -> Callable[[], None]:
        """Keep the shards open, so that `pieces` can be read even if the run removes the checkpoint meanwhile.

        Returns:
            What closes them.
        """
        files = {path: copy.copy(file) for path, file in self.headers.files.items()}  # the headers are cached
        self.headers = dc.replace(self.headers, files=files)
        with contextlib.ExitStack() as opened:
            for file in files.values():
                file.hold()
                opened.callback(file.release)
            return opened.pop_all().close

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Read tensors in place without a plan, for a rank that reads alone.

        Raises:
            ConfigError: a tensor has changed since it was written, or the files no longer hold all of it.
            NotFiniteError: weights hold NaN or infinity.
        """
        strange, lacking = set(), Counter({name: target.numel() for name, target in into.items()})
        with contextlib.ExitStack() as held:
            held.callback(self.hold())  # each file is opened once
            for (name, offsets), path in self.headers.parts.items():
                if (target := into.get(name)) is not None:
                    part, shape = target.detach(), self.headers.files[path].entries[name].shape
                    for dim, (begin, n) in enumerate(zip(offsets, shape, strict=True)):
                        part = part if n == part.shape[dim] else part.narrow(dim, begin, n)
                    if not self.read_part(path, name, part, self.finite and name.startswith(WEIGHTS)):
                        strange.add(name)
                    lacking[name] -= part.numel()
        if short := [name for name, n in lacking.items() if n]:  # a run that goes on may remove it meanwhile
            raise ConfigError(f"the files no longer hold all of {short[0]}")
        if strange:
            raise NotFiniteError(*strange)

    def read_part(self, path: str, name: str, target: Tensor | None, finite: bool) -> bool:
        """Read one shard into its place (None: nowhere). Returns whether its numbers are finite, if that is asked."""
        file, fine = self.headers.files[path], True
        entry, checksum = file.entries[name], self.headers.checksums[path].get(name) if self.verify else None
        dtype = NUMBERS[entry.dtype]
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
    text = metadata.get(SHARDING)
    places = {} if text is None else parse_json(str(text), where)
    for name, entry in file.entries.items():
        place = places.get(name) if text is not None else {OFFSETS: [0] * len(entry.shape)}
        offsets: Any = place.get(OFFSETS) if isinstance(place, dict) else None
        sound = (
            isinstance(offsets, list) and len(offsets) == len(entry.shape)
            and all(type(o) is int and 0 <= o < 2**63 for o in offsets)
        )
        if (
            not sound or entry.dtype not in NUMBERS
            or any(o + n >= 2**63 for o, n in zip(offsets, entry.shape, strict=True))
        ):
            raise ConfigError(f"{where}: {name} must be a part of a tensor, but is {entry} at {json.dumps(place)[:80]}")
        yield name, offsets, entry.shape, NUMBERS[entry.dtype]

"""The weights of a folder, in one file or several; their names are known before any is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from txtrain.errors import ConfigError
from txtrain.ground import plain_files
from txtrain.hf.folder import member
from txtrain.hf.name_map import n_elements, respelt
from txtrain.hf.tensor_file import DTYPES, Entry, PickleFile, SafetensorsFile

TensorFile = SafetensorsFile | PickleFile
_COMPARED = 1 << 22  # elements at a time

# In order of preference: the format, a single file, and the index of several.
_FORMATS: tuple[tuple[type[TensorFile], str, str], ...] = (
    (SafetensorsFile, "model.safetensors", "model.safetensors.index.json"),
    (PickleFile, "pytorch_model.bin", "pytorch_model.bin.index.json"),
)


class Weights:
    """All tensors of a folder by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, tuple[TensorFile, str]] = {}  # the file, and the name there
        for file in _open(folder):
            for name in file.entries:
                if name in self._places:
                    both = f"{self._places[name][0].path.name} and in {file.path.name}"
                    raise ConfigError(f"{folder}: {name} must be in one file, but is in {both}.")
                self._places[name] = file, name

    def add_prefix(self, prefix: str, but: str) -> None:
        """Add the prefix, which folders of the class without a head omit, to names that do not start with `but`."""
        if not any(name.startswith(prefix) for name in self._places):
            places = self._places.items()
            self._places = {name if name.startswith(but) else prefix + name: place for name, place in places}

    def rename(self, renamed: Iterable[tuple[str, str]]) -> None:
        """Apply `respelt` to all names."""
        places: dict[str, tuple[TensorFile, str]] = {}
        for name, place in self._places.items():
            new = respelt(name, renamed)
            if new in places:
                both = f"{places[new][1]} and as {place[1]}"
                raise ConfigError(f"{self.folder}: {new} must be there once, but is there as {both}.")
            places[new] = place
        self._places = places

    @property
    def files(self) -> set[Path]:
        return {file.path for file, _ in self._places.values()}

    def entries(self) -> dict[str, Entry]:
        return {name: file.entries[there] for name, (file, there) in self._places.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor on the CPU. rows: begin and end in its first dimension; None: all."""
        file, there = self._places[name]
        return file.read(there, rows)

    def same(self, a: str, b: str) -> bool:
        """Whether two tensors are equal, in the second's dtype."""
        entries = self.entries()
        if entries[a].shape != entries[b].shape or not {entries[a].dtype, entries[b].dtype} <= DTYPES.keys():
            return False
        shape, dtype = entries[b].shape, DTYPES[entries[b].dtype]
        step = max(1, _COMPARED // max(1, n_elements(shape[1:])))
        parts = [(i, min(i + step, shape[0])) for i in range(0, shape[0], step)] if shape else [None]
        return all(torch.equal(self.read(a, rows).to(dtype), self.read(b, rows)) for rows in parts)


def _open(folder: Path) -> list[TensorFile]:
    for open_file, single, index in _FORMATS:
        if (path := member(folder, single)) is not None:
            return [open_file(path)]
        if (path := member(folder, index)) is not None:
            return _open_shards(folder, open_file, path)
    known = ", ".join(name for _, *names in _FORMATS for name in names)
    raise ConfigError(f"{folder} must hold one of {known}, but holds none of them.")


def _open_shards(folder: Path, open_file: type[TensorFile], index: Path) -> list[TensorFile]:
    places: Any = plain_files.read_json(index, plain_files.TENSORS_LIMIT).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ConfigError(f"{index}: `weight_map` must give the file of each tensor.")
    files: dict[str, TensorFile] = {}
    for name in sorted(set(places.values())):
        if (path := member(folder, name)) is None:
            raise ConfigError(f"{index}: {name} must be in the folder, but is not.")
        files[name] = open_file(path)
    for tensor, name in places.items():
        if tensor not in files[name].entries:
            raise ConfigError(f"{index}: {tensor} must be in {name}, but is not.")
    for name, file in files.items():
        if unlisted := [tensor for tensor in file.entries if tensor not in places]:
            raise ConfigError(f"{index} must name all tensors, but not {unlisted[0]} of {name}.")
    return list(files.values())

"""What a source reads. Files and rows that are in the training split and in the validation split too are refused."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from txtrain.data.sources.files import files_identity
from txtrain.errors import ConfigError


class Origins:
    """Files and sets that a source reads, those of its training split first.

    Attributes:
        known: hashes of their contents, for fingerprints.
    """

    def __init__(self) -> None:
        self.known: list[str] = []
        self._files: list[Path] = []
        self._sets: list[tuple[str, str | None, str]] = []  # path, name, split

    def add_files(self, files: Iterable[Path], key: str) -> None:
        """key: of the config, that names them.

        Raises:
            ConfigError: one is a file of the training split, or all of them together have the contents of its files.
        """
        files = list(files)
        self._refuse_shared(files, key)
        if (known := files_identity(files)) in self.known:
            has = f"{files[0]} has its contents" if len(files) == 1 else "its files have the same contents"
            raise ConfigError(f"`{key}` must not overlap {_training(key)}, but {has}.")
        self.known.append(known)
        self._files += files

    def add_set(self, path: str, name: str | None, split: str, rows: Any, key: str, streamed: bool = False) -> None:
        """rows: what `load_dataset` gives for it; a stream has no hash.

        Raises:
            ConfigError: it shares rows or files with the training split.
        """
        same = [one for one in self._sets if os.path.realpath(one[0]) == os.path.realpath(path)]
        for _, _, trained in same:
            _refuse_slices(trained, split, rows.info.splits or {}, path, key)
        if not same and os.path.exists(path) and (self._files or self._sets):
            self._refuse_shared(_files_of(path, name, split), key)
        self.known += [] if streamed else [rows._fingerprint]
        self._sets.append((path, name, split))

    def _refuse_shared(self, files: Iterable[Path], key: str) -> None:
        local = [one for one in self._sets if os.path.exists(one[0])]
        refuse_shared([*self._files, *(file for one in local for file in _files_of(*one))], files, key)


def refuse_shared(train: Iterable[Path], held: Iterable[Path], key: str = "data.val_path") -> None:
    """Raises ConfigError: a file is in both, under whatever name."""
    trained = {_identity(file) for file in train}
    if both := [file for file in held if _identity(file) in trained]:
        raise ConfigError(f"`{key}` must not overlap {_training(key)}, but both name {min(both)}.")


def names_of(split: str) -> set[str]:
    """The splits in a spec such as `train[:90%]+extra`."""
    return {re.match(r"\w*", part.strip()).group() for part in split.split("+")}  # type: ignore[union-attr]


def _training(key: str) -> str:
    return key.replace("val_", "")


def _identity(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_dev, found.st_ino


def _files_of(path: str, name: str | None, split: str) -> list[Path]:
    """The local files that `load_dataset` reads for a split."""
    if os.path.isfile(path):
        return [Path(path)]
    from datasets import load_dataset_builder

    found = load_dataset_builder(path, name).config.data_files or {}
    return [Path(file) for part in found if names_of(split) & {part, "all"} for file in found[part]]


def _refuse_slices(split: str, val_split: str, sizes: dict[str, Any], path: str, key: str) -> None:
    if split == val_split:
        raise ConfigError(f"`{key}` must not be {_training(key)}, but both are {split} of {path}.")
    specs = ["+".join(sizes) if spec == "all" else spec for spec in (split, val_split)]
    if not names_of(specs[0]) & names_of(specs[1]):
        return
    from datasets import ReadInstruction

    lengths = {name: info.num_examples for name, info in sizes.items()}
    trained, held_out = (ReadInstruction.from_spec(spec).to_absolute(lengths) for spec in specs)
    for held in held_out:
        for part in trained:
            begin, end = max(part.from_, held.from_), min(part.to, held.to)
            if part.splitname == held.splitname and begin < end:
                raise ConfigError(
                    f"`{key}` must not overlap {_training(key)}, but {val_split} and {split} share rows "
                    f"{begin} to {end - 1} of {held.splitname}."
                )

"""data=text: the user's own files, one document a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from txtrain.data.files import files_identity, find_files, read_text
from txtrain.data.sources import Split
from txtrain.errors import ConfigError


class TextFiles:
    """Files, globs, folders of .txt, or a list of them.

    Raises:
        ConfigError: a path that does not exist, or a file in both path and val_path.
    """

    def __init__(self, path: str | tuple[str, ...] | None, val_path: str | tuple[str, ...] | None = None) -> None:
        if not path:
            raise ConfigError("`data.path` must be given with data=text: a file, a glob, or a folder of .txt files.")
        self.files: dict[Split, list[Path]] = {"train": find_files(path, "data.path")}
        if val_path:
            self.files["validation"] = find_files(val_path, "data.val_path")
            if both := set(self.files["train"]) & set(self.files["validation"]):
                raise ConfigError(f"`data.val_path` must not overlap data.path, but both name {min(both)}.")
        self.path = path
        self.has_validation = bool(val_path)

    def documents(self, split: Split) -> Iterator[str]:
        key = "data.path" if split == "train" else "data.val_path"
        return (read_text(file, key) for file in self.files[split])

    def identity(self) -> str:
        return " ".join(files_identity(files) for files in self.files.values())

    def describe(self) -> str:
        n = sum(map(len, self.files.values()))
        return f"{self.path if isinstance(self.path, str) else ', '.join(self.path)} ({n} file{'s' * (n > 1)}, {self.n_bytes / 1e6:.1f} MB)"

    @property
    def n_bytes(self) -> int:
        return sum(p.stat().st_size for files in self.files.values() for p in files)

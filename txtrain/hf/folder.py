"""A model's folder; no file name may lead out of it."""

from __future__ import annotations

import os
from pathlib import Path

from txtrain.data.tokenizer.folder import files_in
from txtrain.errors import ConfigError
from txtrain.ground import plain_files
from txtrain.ground.files import path_of


def checked(folder: str | os.PathLike[str]) -> Path:
    path = path_of(folder, "folder")
    if not path.is_dir():
        found = "a file" if path.exists() else "not there"
        raise ConfigError(f"`load_pretrained` must be given a folder, but {str(folder)!r} is {found}.")
    return path


def member(folder: Path, name: str) -> Path | None:
    """The regular file of that name directly in the folder, or None if there is none.

    A link must stay in the folder, except in the hub's cache: snapshots/REVISION/NAME -> ../../blobs/HASH.

    Raises:
        ConfigError: the name or the link leads elsewhere, or the link to no file, as in a hub's cache that lost some.
    """
    if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise ConfigError(f"{folder}: a file must be named within the folder, but {name!r} leads out of it.")
    path = folder / name
    if not path.is_file():
        if path.is_symlink():
            raise ConfigError(f"{path} must be a file, but is a link to none: {os.readlink(path)}.")
        return None
    plain_files.check_links([path])
    return path


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of the files of tokenizer and image preprocessing, for copies byte for byte."""
    return files_in(folder) | contents(folder, "preprocessor_config.json")


def contents(folder: Path, name: str) -> dict[str, bytes]:
    """The file of that name and its content, if it is there."""
    path = member(folder, name)
    return {} if path is None else {name: plain_files.read_bytes(path)}

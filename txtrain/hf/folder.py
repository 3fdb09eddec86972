"""A model's folder; no file name may lead out of it."""

from __future__ import annotations

import os
from pathlib import Path

from txtrain.errors import ConfigError
from txtrain.ground import plain_files
from txtrain.ground.files import path_of

# Files of a tokenizer and of image preprocessing, copied byte for byte.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "source.spm", "target.spm",
    "preprocessor_config.json",
)


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
        ConfigError: the name or the link leads elsewhere.
    """
    if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise ConfigError(f"{folder}: a file must be named within the folder, but {name!r} leads out of it.")
    path = folder / name
    if not path.is_file():
        return None
    plain_files.check_links([path])
    return path


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of the tokenizer's files."""
    paths = {name: member(folder, name) for name in TOKENIZER_FILES}
    limit = plain_files.TOKENIZER_LIMIT
    return {name: plain_files.read_bytes(path, limit) for name, path in paths.items() if path is not None}

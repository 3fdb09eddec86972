"""Tokenised text on disk: written once, complete or absent, read through a memory map.

    <cache_dir>/<fingerprint>/
        train.bin  validation.bin                 token ids, uint16 (uint32 from a vocabulary of 65,536 on)
        train.offsets.npy  validation.offsets.npy int64 [n_documents + 1]: begins of documents, and the end
        train.trained  validation.trained         if only some tokens are trained: a byte per token, 1 for those
        train.numbers.npy  validation.numbers.npy and int64 [n_documents]: the conversation of each document
        meta.json                                 the source; size and SHA-256 of each file; a hash of itself

The fingerprint identifies the text, its split and the tokenizer: any process that knows it may read the folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txtrain.data.sources.files import HASHED_BELOW
from txtrain.data.sources.source import SPLITS, Marked, Split
from txtrain.data.store.tokens import Shard, Tokens
from txtrain.errors import ConfigError
from txtrain.ground import files
from txtrain.ground.plain_files import check_keys, map_npy, read_json

log = logging.getLogger(__name__)

META = "meta.json"
TOKEN_FILES = (META, *(f"{split}.{end}" for split in SPLITS for end in ("bin", "offsets.npy")))
# Besides, if only some tokens are trained.
MARK_FILES = tuple(f"{split}.{end}" for split in SPLITS for end in ("trained", "numbers.npy"))


def cache_root(cache_dir: str | None) -> Path:
    """data.cache_dir, else $TXTRAIN_CACHE, else $XDG_CACHE_HOME/txtrain, else ~/.cache/txtrain.

    Raises:
        ConfigError: it is below the home folder, which is unknown.
    """
    key, given = _chosen(cache_dir)
    try:
        root = Path(given).expanduser()
    except RuntimeError as e:
        remedy = "Set it, or say where the cache is to be: data.cache_dir or TXTRAIN_CACHE"
        raise ConfigError(f"`{key}` must tell where {given} is, but does not: {e} {remedy}.") from e
    return root if key in ("data.cache_dir", "TXTRAIN_CACHE") else root / "txtrain"


def _chosen(cache_dir: str | None) -> tuple[str, str]:
    """The key or environment variable that sets the place of the cache, and its value."""
    variables = {name: os.environ.get(name) for name in ("TXTRAIN_CACHE", "XDG_CACHE_HOME")}
    given = {"data.cache_dir": cache_dir, **variables}
    return next(((key, value) for key, value in given.items() if value), ("HOME", "~/.cache"))


# -------------------------------------------------------------------------------------------------------------- folders


def cached(cache_dir: str | None, name: str, fill: Callable[[Path], None], needs: Sequence[str] = ()) -> Path:
    """The folder of that name in the cache; see `build_folder`."""
    return build_folder(cache_root(cache_dir) / name, fill, needs, _chosen(cache_dir)[0])


def find(cache_dir: str | None, name: str, needs: Sequence[str]) -> Path | None:
    """The folder of that name in the cache, if it is there and whole."""
    folder = cache_root(cache_dir) / name
    return folder if folder.is_dir() and not _damage(folder, needs) else None


def build_folder(
    folder: Path, fill: Callable[[Path], None], needs: Sequence[str] = (), key: str = "data.cache_dir"
) -> Path:
    """`folder`, filled by `fill` unless it exists; other processes see it complete or not at all.

    It is filled under a temporary name and renamed. If two processes do so at once, the second one discards its copy.
    A folder with missing or changed files (by its meta.json) is rebuilt.

    Args:
        needs: names of required files.
        key: the key that sets the place of the cache, for errors.

    Raises:
        ConfigError: its meta.json is damaged, or it cannot be written.
    """
    if os.path.isdir(folder) and not _damage(folder, needs):
        return folder
    files.check_writable(folder, key)
    with files.writing(folder, key):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with files.temporary(folder.parent, folder.name) as made:
            if folder.is_dir():
                log.warning("%s: %s: it is rebuilt", folder, _damage(folder, needs))
            fill(made)
            _seal(made)
            if folder.is_dir() and _damage(folder, needs):  # another process may have rebuilt it meanwhile
                shutil.rmtree(folder)
            try:
                made.rename(folder)
                (folder / files.LOCK).unlink()
            except OSError as e:
                if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another process was first
                    raise
    return folder


def _seal(folder: Path) -> None:
    """Write size and hash of each file to meta.json, and sync all files to disk."""
    said = read_json(folder / META) if (folder / META).exists() else {}
    said["files"] = {}
    for path in sorted(folder.iterdir()):
        if path.name not in (META, files.LOCK):
            said["files"][path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            files.sync(path)
    said["check"] = _check_of(said)
    files.write(folder / META, json.dumps(said, indent=2) + "\n")


def _damage(folder: Path, needs: Sequence[str]) -> str | None:
    """What has changed in a folder since it was written; None: nothing. Contents are checked if the files are small.

    Raises:
        ConfigError: its meta.json is damaged.
    """
    if missing := [name for name in needs if not (folder / name).is_file()]:
        return f"{missing[0]} is missing"
    said = read_json(folder / META) if (folder / META).is_file() else {}
    told = said.get("files")
    if told is None:  # written by an older version
        return None
    if said.get("check") != _check_of(said):
        raise ConfigError(f"{folder / META} must be as it was written, but has changed. Remove the folder.")
    check_keys(said, str(folder / META), {"files": dict[str, dict[str, Any]]})
    sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else None for name in told}
    for name, size in sizes.items():
        if size != told[name].get("bytes"):
            wanted = told[name].get("bytes")
            return f"{name} is missing" if size is None else f"{name} has {size} bytes instead of {wanted}"
    hashed = told if sum(size or 0 for size in sizes.values()) < HASHED_BELOW else ()
    changed = (name for name in hashed if _sha256(folder / name) != told[name].get("sha256"))
    return next((f"{name} has changed since it was written" for name in changed), None)


def _check_of(said: dict[str, Any]) -> str:
    rest = {key: value for key, value in said.items() if key != "check"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------- files


class TokenWriter:
    """Writes the files of both splits into `folder`, document by document. marked: with `append_marked`."""

    def __init__(self, folder: Path, vocab_size: int, marked: bool = False) -> None:
        self.folder, self.vocab_size, self.marked = folder, vocab_size, marked
        self.dtype = np.dtype(np.uint16 if vocab_size < 1 << 16 else np.uint32)
        self.offsets = {split: array("q", [0]) for split in SPLITS}
        self.numbers = {split: array("q") for split in SPLITS}

    @contextmanager
    def open(self) -> Iterator[TokenWriter]:
        with ExitStack() as stack:
            self._files = {split: stack.enter_context((self.folder / f"{split}.bin").open("wb")) for split in SPLITS}
            masks = {split: (self.folder / f"{split}.trained").open("wb") for split in SPLITS if self.marked}
            self._masks = {split: stack.enter_context(file) for split, file in masks.items()}
            self._n = dict.fromkeys(SPLITS, 0)
            yield self

    def append(self, split: Split, ids: Sequence[int], ends: bool) -> None:
        """ends: these are the last tokens of their document."""
        self._files[split].write(np.array(ids, dtype=self.dtype).tobytes())
        self._n[split] += len(ids)
        if ends:
            self.offsets[split].append(self._n[split])

    def append_marked(self, split: Split, text: Marked) -> None:
        """A whole document."""
        self._masks[split].write(marks_of(text, self.vocab_size).tobytes())
        self.numbers[split].append(text.number)
        self.append(split, text.ids, ends=True)

    def finish(self, **about: Any) -> None:
        """Write offsets and meta.json, after the last document."""
        for split in SPLITS:
            np.save(self.folder / f"{split}.offsets.npy", np.frombuffer(self.offsets[split], dtype=np.int64))
            if self.marked:
                np.save(self.folder / f"{split}.numbers.npy", np.frombuffer(self.numbers[split], dtype=np.int64))
        meta = {"dtype": self.dtype.name, "n_tokens": self._n, **about}
        (self.folder / META).write_text(json.dumps(meta, indent=2) + "\n")

    @property
    def n_tokens(self) -> int:
        return sum(self._n.values())


def marks_of(text: Marked, vocab_size: int) -> NDArray[np.uint8]:
    """A byte per token, 1 if it is trained: the first one never is.

    Raises:
        ConfigError: there is not one mark per token, or a token is outside of the vocabulary.
    """
    trained = np.array(text.trained, dtype=np.uint8)
    if len(trained) != len(text.ids):
        each = f"a mark for each of its {len(text.ids)} tokens"
        raise ConfigError(f"`data`: text {text.number} must have {each}, but has {len(trained)}.")
    if text.ids and not 0 <= min(text.ids) <= max(text.ids) < vocab_size:
        known = f"tokens from 0 to {vocab_size - 1}"
        raise ConfigError(f"`data`: text {text.number} must be of {known}, but has others.")
    trained[:1] = 0
    return trained


class TokenFile(Tokens):
    """One split of a cache folder."""

    def __init__(self, folder: Path, split: Split) -> None:
        path, said = folder / f"{split}.bin", read_json(folder / META)
        check_keys(said, str(folder / META), {"dtype": str, "n_tokens": dict[str, int]})
        dtype, n_tokens = said["dtype"], said["n_tokens"].get(split)
        if dtype not in ("uint16", "uint32") or n_tokens is None:
            raise ConfigError(f"{folder / META} must have `dtype` and `n_tokens`, but has not. Remove the folder.")
        size = path.stat().st_size if path.is_file() else None
        if size != n_tokens * np.dtype(dtype).itemsize:
            have = "is missing" if size is None else f"has {size:,} bytes"
            raise ConfigError(
                f"{path} must have {n_tokens:,} tokens, as its meta.json says, but {have}. Remove the folder."
            )
        marks, numbers = folder / f"{split}.trained", partial(_mapped, folder / f"{split}.numbers.npy")
        masked: dict[str, Any] = {"trained": marks, "numbers": numbers} if marks.is_file() else {}
        borders = partial(_mapped, folder / f"{split}.offsets.npy")
        pairs = said.get("pairs") is True
        super().__init__([Shard(path, dtype, n_tokens, borders=borders, **masked)], split, pairs=pairs)

    @property
    def ids(self) -> NDArray[np.unsignedinteger[Any]]:
        return self.shards[0].ids


def _mapped(path: Path) -> NDArray[np.int64]:
    return map_npy(path)

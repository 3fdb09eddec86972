"""Tokenised text on disk: written once, complete or absent, read through a memory map.

    <cache_dir>/<fingerprint>/
        train.bin  validation.bin                 token ids, uint16 (uint32 from a vocabulary of 65,536 on): all documents in a row
        train.offsets.npy  validation.offsets.npy int64 [n_documents + 1]: where each document begins, and the end
        train.trained  validation.trained         where only some tokens are trained: a byte for each token, 1 for those
        train.numbers.npy  validation.numbers.npy and int64 [n_documents]: which conversation of the source each document is of
        meta.json                                 sizes, and what the text was

The fingerprint says what is inside: the text, how it was split, and the tokenizer. Any process that knows it may read the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txtrain.data.sources.source import SPLITS, Marked, Split
from txtrain.data.store.tokens import Shard, Tokens
from txtrain.errors import ConfigError
from txtrain.ground import files
from txtrain.ground.plain_files import map_npy, read_json


def cache_root(cache_dir: str | None) -> Path:
    """data.cache_dir, else $TXTRAIN_CACHE, else $XDG_CACHE_HOME/txtrain, else ~/.cache/txtrain."""
    given = cache_dir or os.environ.get("TXTRAIN_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "txtrain"


# ------------------------------------------------------------------------------------------------------------------- folders


def build_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """`folder`, filled by `fill` unless it is there already. Others see it complete or not at all.

    It is filled under a temporary name beside it and renamed. Two processes at once are safe: the second finds the name taken by
    the same contents and throws its own away.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder.parent)
    prefix = f".{socket.gethostname()}.{os.getpid()}."
    temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=folder.parent))
    try:
        fill(temporary)
        for path in temporary.iterdir():
            files.sync(path)
        with suppress(OSError):  # somebody else was first
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _remove_stale(root: Path) -> None:
    """Temporary folders of processes of this machine that are no more."""
    prefix = f".{socket.gethostname()}."
    for path in root.glob(f"{prefix}*.tmp"):
        pid = path.name.removeprefix(prefix).partition(".")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except PermissionError:  # it lives, under another user
            continue


# --------------------------------------------------------------------------------------------------------------------- files


class TokenWriter:
    """Writes the files of both splits below `folder`, document after document. marked: by `append_marked`."""

    def __init__(self, folder: Path, vocab_size: int, marked: bool = False) -> None:
        self.folder, self.vocab_size, self.marked = folder, vocab_size, marked
        self.dtype = np.dtype(np.uint16 if vocab_size < 1 << 16 else np.uint32)
        self.offsets = {split: array("q", [0]) for split in SPLITS}
        self.numbers = {split: array("q") for split in SPLITS}

    @contextmanager
    def open(self) -> Iterator[TokenWriter]:
        with ExitStack() as stack:
            self._files = {split: stack.enter_context((self.folder / f"{split}.bin").open("wb")) for split in SPLITS}
            self._masks = {split: stack.enter_context((self.folder / f"{split}.trained").open("wb")) for split in SPLITS if self.marked}
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
        trained = np.array(text.trained, dtype=np.uint8)
        if len(trained) != len(text.ids):
            raise ConfigError(f"`data`: text {text.number} must have a mark for each of its {len(text.ids)} tokens, but has {len(trained)}.")
        if text.ids and not 0 <= min(text.ids) <= max(text.ids) < self.vocab_size:
            raise ConfigError(f"`data`: text {text.number} must be of tokens from 0 to {self.vocab_size - 1}, but has others.")
        trained[:1] = 0
        self._masks[split].write(trained.tobytes())
        self.numbers[split].append(text.number)
        self.append(split, text.ids, ends=True)

    def finish(self, **about: Any) -> None:
        """Offsets and meta.json, once all documents are written."""
        for split in SPLITS:
            np.save(self.folder / f"{split}.offsets.npy", np.frombuffer(self.offsets[split], dtype=np.int64))
            if self.marked:
                np.save(self.folder / f"{split}.numbers.npy", np.frombuffer(self.numbers[split], dtype=np.int64))
        (self.folder / "meta.json").write_text(json.dumps({"dtype": self.dtype.name, "n_tokens": self._n, **about}, indent=2) + "\n")

    @property
    def n_tokens(self) -> int:
        return sum(self._n.values())


class TokenFile(Tokens):
    """One split of a cache folder."""

    def __init__(self, folder: Path, split: Split) -> None:
        path = folder / f"{split}.bin"
        dtype = read_json(folder / "meta.json").get("dtype")
        if dtype not in ("uint16", "uint32"):
            raise ConfigError(f"{folder}: its meta.json must have a `dtype` of tokens, but has not. Remove the folder.")
        n_tokens = path.stat().st_size // np.dtype(dtype).itemsize
        marks, numbers = folder / f"{split}.trained", partial(_mapped, folder / f"{split}.numbers.npy")
        masked: dict[str, Any] = {"trained": marks, "numbers": numbers} if marks.is_file() else {}
        super().__init__([Shard(path, dtype, n_tokens, borders=partial(_mapped, folder / f"{split}.offsets.npy"), **masked)], split)

    @property
    def ids(self) -> NDArray[np.unsignedinteger[Any]]:
        return self.shards[0].ids


def _mapped(path: Path) -> NDArray[np.int64]:
    return map_npy(path)

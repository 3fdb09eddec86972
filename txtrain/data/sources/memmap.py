"""data=memmap: token files in our own format or that of another tool, possibly larger than memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from txtrain.data.sources.files import PACKED, files_identity, find_files, listed
from txtrain.data.sources.origins import refuse_shared
from txtrain.data.sources.source import Split
from txtrain.data.store.formats import INDEX, KINDS, MARKED, own_shards, read_index, shard_of
from txtrain.data.store.split import digest
from txtrain.data.store.tokens import Shard
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.errors import ConfigError
from txtrain.ground.files import path_of

_NANOGPT = ("train.bin", "val.bin")


class TokenFiles:
    """Folders of `txtrain prepare`, files of other tools, or folders and globs of these.

    Validation: `val_path`; else the validation files of the folder (ours, or nanoGPT's val.bin); else the last
    val_fraction of each file, cut between documents if the format has them.

    Args:
        tokenizer: of the ids; None: the one in a folder of ours.
        dtype: of files without a header.

    Raises:
        ConfigError: a path does not exist, or files are of no such format or of another tokenizer.
    """

    has_validation = True

    def __init__(
        self, path: str | tuple[str, ...] | None, val_path: str | tuple[str, ...] | None, tokenizer: str | None,
        dtype: str, val_fraction: float, seq_len: int,
    ) -> None:
        if not path:
            raise ConfigError(
                "`data.path` must be given with data=memmap: a folder of txtrain prepare, "
                "or files of tokens (.bin, .npy)."
            )
        self.path, self.dtype = path, dtype
        self._indexes: dict[Path, dict[str, Any]] = {}  # of our folders
        self._val_fraction: float | None = None  # if the ends of files are held out
        self.shards = self._all(path, "data.path")
        self.every = [*self.shards["train"], *self.shards["validation"]]  # of data.path, nothing held out
        if val_path:
            self.shards["validation"] = [
                shard for shards in self._all(val_path, "data.val_path").values() for shard in shards
            ]
            trained, held = ([shard.path for shard in shards] for shards in self.shards.values())
            refuse_shared(trained, held)
        elif not self.shards["validation"]:
            self._val_fraction = val_fraction
            cuts = [(shard, _cut(shard, val_fraction)) for shard in self.shards["train"]]
            self.shards = {
                "train": [s.part(0, cut) for s, cut in cuts],
                "validation": [s.part(cut, s.n_tokens) for s, cut in cuts],
            }
        self.tokenizer = self._tokenizer(tokenizer)
        self._check_marks(seq_len)

    def tokens(self, split: Split) -> Sequence[Shard]:
        return self.shards[split]

    @property
    def in_pairs(self) -> bool:
        """Whether the texts are pairs of preferences."""
        return any(index.get("pairs") for index in self._indexes.values())

    # ------------------------------------------------------------------------------------------------------------- open

    def _all(self, path: str | tuple[str, ...], key: str) -> dict[Split, list[Shard]]:
        """The shards of all paths, and the validation shards of their folders."""
        found: dict[Split, list[Shard]] = {"train": [], "validation": []}
        for name in listed(path):
            here = path_of(name, key)
            if (here / INDEX).is_file():
                index = self._indexes[here.resolve()] = read_index(here, key)
                for split, shards in found.items():
                    shards += own_shards(here.resolve(), index, split)
            elif all((here / file).is_file() for file in _NANOGPT) and not any(here.glob("*.idx")):
                for (_, shards), file in zip(found.items(), _NANOGPT, strict=True):
                    shards.append(shard_of((here / file).resolve(), key, self.dtype))
            else:
                found["train"] += [shard_of(file, key, self.dtype) for file in _files(name, key)]
        return found

    def _check_marks(self, seq_len: int) -> None:
        """Conversations and preferences were cut to a length; they are not mixed with texts or with each other."""
        forms = {(str(index["format"]), bool(index.get("pairs"))) for index in self._indexes.values()}
        marked = [(folder, index) for folder, index in self._indexes.items() if index["format"] == MARKED]
        if marked and (len(forms) > 1 or any(s.trained is None for shards in self.shards.values() for s in shards)):
            raise ConfigError(f"`data.path` must be of one kind, but {marked[0][0]} holds marked texts and others not.")
        for folder, index in marked:
            if seq_len < index["seq_len"]:
                prepared = f"{index['seq_len']}, for which {folder} was prepared"
                raise ConfigError(f"`data.seq_len` must be at least {prepared}, but is {seq_len} instead.")

    def _tokenizer(self, given: str | None) -> Tokenizer | None:
        told = {str(index["tokenizer"]): folder for folder, index in self._indexes.items()}
        if len(told) > 1:
            raise ConfigError(
                f"`data.path` must be of one tokenizer, but {' and '.join(map(str, told.values()))} are of several."
            )
        if given is None:
            return load_tokenizer(next(iter(told.values())) / "tokenizer") if told else None
        tokenizer = load_tokenizer(given)
        for known, folder in told.items():
            if tokenizer.fingerprint in (known, load_tokenizer(folder / "tokenizer").fingerprint):
                continue
            raise ConfigError(
                f"`data.tokenizer` must be the one of {folder}, but is {given} instead. "
                "Leave it out: the folder has its own."
            )
        return tokenizer

    # --------------------------------------------------------------------------------------------------------- identity

    @property
    def folders(self) -> Sequence[Path]:
        """The folders of `txtrain prepare`."""
        return list(self._indexes)

    @property
    def key(self) -> str:
        """Identifies the tokens. A folder of ours keeps the key of the text and tokenizer that it was made from."""
        folders = {s.path.parent for shards in self.shards.values() for s in shards}
        if len(self._indexes) == 1 and folders == set(self._indexes):
            return str(next(iter(self._indexes.values()))["key"])
        files = list(dict.fromkeys(s.path for shards in self.shards.values() for s in shards))
        tokenizer = None if self.tokenizer is None else self.tokenizer.fingerprint
        return digest(
            "memmap", files_identity(files), self.dtype, self._val_fraction, len(self.shards["train"]), tokenizer
        )

    def describe(self) -> str:
        shards = [s for shards in self.shards.values() for s in shards]
        n, files = sum(s.n_tokens for s in shards), len({s.path for s in shards})
        return (
            f"{self.path if isinstance(self.path, str) else ', '.join(self.path)} "
            f"({files} file{'s' * (files > 1)}, {n:,} tokens)"
        )


def _files(name: str, key: str) -> list[Path]:
    """Token files; Megatron's .idx, or the common name of .bin and .idx, stands for the .bin."""
    path = path_of(name, key)
    prefix = path.with_suffix("") if path.suffix == ".idx" else path
    beside = prefix.with_name(prefix.name + ".bin")
    if not path.is_dir() and beside.is_file() and prefix.with_name(prefix.name + ".idx").is_file():
        return [beside.resolve()]
    found = find_files((name,), key, KINDS, "tokens")
    if packed := [file for file in found if file.suffix in PACKED]:
        allowed = "files of tokens as they are, which are mapped into memory and never unpacked"
        raise ConfigError(f"`{key}` must be {allowed}, but {packed[0]} is packed ({packed[0].suffix}).")
    return [file for file in found if file.suffix != ".idx"]


def _cut(shard: Shard, val_fraction: float) -> int:
    """Where the held-out end of a file begins: between two documents, if they are known."""
    want = round(shard.n_tokens * (1 - val_fraction))
    if shard.offsets is None or len(shard.offsets) <= 2:
        return want
    inner = shard.offsets[1:-1]
    return int(inner[min(int(np.searchsorted(inner, want)), len(inner) - 1)])

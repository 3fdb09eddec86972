"""Formats of token files, ours and those of other tools. A file becomes a `Shard`; no tokens are read.

ours        a folder with index.json, which `txtrain prepare` writes
Megatron    NAME.bin: concatenated tokens; NAME.idx: magic, version, dtype, sizes and offsets of sequences, documents
nanoGPT     NAME.bin: raw uint16 tokens
OLMo        NAME.npy: raw uint16 or uint32 tokens (numpy.memmap writes no header); true .npy files are read too
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from txtrain.data.samples.order import Indices
from txtrain.data.sources.source import Split
from txtrain.data.store.tokens import Shard
from txtrain.errors import ConfigError, shorten
from txtrain.ground.plain_files import check_keys, map_npy, read_json

INDEX = "index.json"  # of our own format; written last
FORMAT = "txtrain tokens 1"
MARKED = "txtrain tokens 2"  # with a mask of trained tokens, which versions that know the first alone would not see
KINDS = (".bin", ".npy")
_MOST = 1 << 48  # tokens per file, at most

_MEGATRON = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_HEADER = struct.Struct("<QBQQ")  # version, type, sequences, documents + 1
_NPY = b"\x93NUMPY"


def shard_of(path: Path, key: str, dtype: str) -> Shard:
    """A file of another tool, recognised by its name and first bytes. dtype: of files without a header.

    Raises:
        ConfigError: the size is no multiple of the dtype's, or the file is not of its format.
    """
    index = path.with_suffix(".idx")
    if path.suffix == ".bin" and index.is_file():
        return _megatron(path, index, key)
    with path.open("rb") as f:
        if f.read(len(_NPY)) == _NPY:
            return _npy(path, key)
    return _raw(path, key, dtype)


def _raw(path: Path, key: str, dtype: str) -> Shard:
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if size % width:
        raise ConfigError(
            f"`{key}`: {path} must hold tokens of {width} bytes (data.dtype={dtype}), but has {size} bytes. "
            "Another data.dtype?"
        )
    return Shard(path, np.dtype(dtype).newbyteorder("<").str, size // width)


def _npy(path: Path, key: str) -> Shard:
    found: Any = map_npy(path, f"`{key}`: {path}")
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ConfigError(
            f"`{key}` must hold one row of integers, but {path} holds {found.dtype} of shape {list(found.shape)}."
        )
    return Shard(path, found.dtype.str, len(found), found.offset)


# ------------------------------------------------------------------------------------------------------------- Megatron


def _megatron(path: Path, index: Path, key: str) -> Shard:
    dtype, n_sequences, n_documents = _megatron_header(index, key)
    width, size = np.dtype(dtype).itemsize, path.stat().st_size
    n_tokens = size // width
    lengths, places, documents = _megatron_tables(index, n_sequences, n_documents)
    end = int(places[-1]) + int(lengths[-1]) * width if n_sequences else 0
    if end != size or (n_documents and int(documents[-1]) != n_sequences):
        raise ConfigError(
            f"`{key}`: {index} must describe the {size} bytes of {path.name}, but describes {end}: "
            "they do not belong together."
        )
    return Shard(
        path, np.dtype(dtype).newbyteorder("<").str, n_tokens,
        borders=partial(_megatron_borders, index, width, n_sequences, n_documents),
    )


def _megatron_header(index: Path, key: str) -> tuple[str, int, int]:
    with index.open("rb") as f:
        raw = f.read(len(_MEGATRON) + _HEADER.size)
    if not raw.startswith(_MEGATRON) or len(raw) < len(_MEGATRON) + _HEADER.size:
        raise ConfigError(
            f"`{key}`: {index} must begin as an index of Megatron does (MMIDIDX), but does not. "
            "If the .bin is of another format, remove the .idx beside it."
        )
    version, code, n_sequences, n_documents = _HEADER.unpack(raw[len(_MEGATRON) :])
    if version != 1 or code not in _MEGATRON_TYPES:
        raise ConfigError(
            f"`{key}`: {index} must be of version 1 and of integers, but is of version {version} and type {code}."
        )
    needed = len(raw) + n_sequences * (4 + 8) + n_documents * 8
    if index.stat().st_size < needed:
        raise ConfigError(
            f"`{key}`: {index} must have {needed} bytes for its {n_sequences} sequences, "
            f"but has {index.stat().st_size}: it is cut off."
        )
    return _MEGATRON_TYPES[code], n_sequences, n_documents


def _megatron_tables(index: Path, n_sequences: int, n_documents: int) -> tuple[Any, Any, Any]:
    """Sizes of sequences in tokens, their offsets in bytes, and the first sequence of each document; memory-mapped."""
    at = len(_MEGATRON) + _HEADER.size
    tables = []
    for dtype, n in (("<i4", n_sequences), ("<i8", n_sequences), ("<i8", n_documents)):
        tables.append(np.memmap(index, dtype=dtype, mode="r", offset=at, shape=(n,)) if n else np.zeros(0, dtype=dtype))
        at += n * np.dtype(dtype).itemsize
    return tables[0], tables[1], tables[2]


def _megatron_borders(index: Path, width: int, n_sequences: int, n_documents: int) -> Indices:
    lengths, places, documents = _megatron_tables(index, n_sequences, n_documents)
    end = (int(places[-1]) // width + int(lengths[-1])) if n_sequences else 0
    first = np.unique(documents[:-1])  # a document without sequences begins where the next does
    if len(first) and not 0 <= first[0] <= first[-1] < n_sequences:
        raise ConfigError(f"{index} must give the first of {n_sequences:,} sequences of each document, but does not.")
    return _ascending(np.concatenate((np.asarray(places[first]) // width, [end])), end, index)


# ----------------------------------------------------------------------------------------------------------------- ours


def read_index(folder: Path, key: str) -> dict[str, Any]:
    """The index.json of one of our folders.

    Raises:
        ConfigError: it is of another format, or a file that it names is missing or truncated.
    """
    path = folder / INDEX
    found = read_json(path)
    if found.get("format") not in (FORMAT, MARKED):
        raise ConfigError(
            f"`{key}`: {path} must be of format {FORMAT!r}, but is of {shorten(repr(found.get('format')))}."
        )
    if found["format"] == MARKED:
        check_keys(found, str(path), {"pairs": bool, "seq_len": int})
    check_keys(found, str(path), {"key": str, "dtype": str, "tokenizer": str, "shards": dict})
    check_shards(found["shards"], str(path))
    if found["dtype"] not in ("uint16", "uint32"):
        raise ConfigError(f"{path}: `dtype` must be uint16 or uint32, but is {shorten(found['dtype'])} instead.")
    check_files(folder, found["shards"], np.dtype(found["dtype"]), found["format"] == MARKED, key)
    return found


def check_files(
    folder: Path, shards: dict[Any, list[dict[str, int]]], dtype: np.dtype[Any], marked: bool, key: str,
    unfinished: bool = False,
) -> None:
    """Refuse files of shards that are missing or of another size. unfinished: they may be longer."""
    for split in ("train", "validation"):
        for name, shard in _files(shards, split):
            for end, size in sizes_of(shard, dtype, marked).items():
                file = folder / f"{name}{end}"
                have = file.stat().st_size if file.is_file() else None
                if have == size or (unfinished and (have or 0) >= size):
                    continue
                wanted = f"{'at least ' if unfinished else ''}{size} bytes"
                but = "is missing" if have is None else f"has {have}"
                remedy = f"Remove {folder}, and prepare again" if unfinished else "Prepare again"
                raise ConfigError(f"`{key}`: {file} must have {wanted}, but {but}. {remedy}.")


def check_shards(shards: dict[str, Any], where: str) -> None:
    """Refuse what does not list files with their numbers of tokens and documents for each split."""
    for split in ("train", "validation"):
        check_keys(shards, f"{where}: shards", {split: list[dict[str, Any]]})
        for n, shard in enumerate(shards[split]):
            check_keys(shard, f"{where}: shards.{split}.{n}", {"n_tokens": int, "n_documents": int})
            if not (0 <= shard["n_tokens"] < _MOST and 0 <= shard["n_documents"] < _MOST):
                raise ConfigError(f"{where}: shards.{split}.{n} must have counts from 0 on, but has {shard}.")


def own_shards(folder: Path, index: dict[str, Any], split: Split) -> list[Shard]:
    dtype = np.dtype(index["dtype"]).newbyteorder("<").str
    made: list[Shard] = []
    for name, shard in _files(index["shards"], split):
        n = shard["n_tokens"]
        marks: dict[str, Any] = {}
        if index["format"] == MARKED:
            marks = {"trained": folder / f"{name}.trained", "numbers": partial(_numbers, folder / f"{name}.numbers")}
        borders = partial(_own_borders, folder / f"{name}.ends", n)
        made.append(Shard(folder / f"{name}.bin", dtype, n, borders=borders, **marks))
    return made


def sizes_of(shard: dict[str, int], dtype: np.dtype[Any], marked: bool) -> dict[str, int]:
    """The bytes of the files of a shard, by the end of their names."""
    sizes = {".bin": shard["n_tokens"] * dtype.itemsize, ".ends": shard["n_documents"] * 8}
    return sizes | ({".trained": shard["n_tokens"], ".numbers": shard["n_documents"] * 8} if marked else {})


def _files(shards: dict[Any, list[dict[str, int]]], split: str) -> Iterator[tuple[str, dict[str, int]]]:
    for number, shard in enumerate(shards[split]):
        yield shard_name(split, number), shard


def _numbers(path: Path) -> Indices:
    found: Indices = np.fromfile(path, dtype="<i8")
    if found.min(initial=0) < 0:
        raise ConfigError(f"{path} must give the number of each document's row from 0 on, but does not.")
    return found


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}"


def _own_borders(path: Path, n_tokens: int) -> Indices:
    return _ascending(np.concatenate(([0], np.fromfile(path, dtype="<i8"))), n_tokens, path)


def _ascending(borders: Indices, n_tokens: int, path: Path) -> Indices:
    """The borders, which must ascend from 0 to n_tokens; else raises ConfigError."""
    if borders[0] != 0 or borders[-1] != n_tokens or np.any(borders[1:] < borders[:-1]):
        raise ConfigError(f"{path} must give the end of each document among {n_tokens:,} tokens, but does not.")
    return borders

"""The folder of token files that `txtrain prepare` writes, and resumes after an interruption.

DIR/
    train-00000.bin, ...    token ids, uint16 (uint32 from a vocabulary of 65,536 on)
    train-00000.ends, ...   int64: the end of each document of that file
    train-00000.trained     if only some tokens are trained: a byte per token, 1 for those
    train-00000.numbers     and int64: the source item of each document
    validation-00000.bin, validation-00000.ends, ...
    tokenizer/              tokenizer.json, tokenizer_config.json
    state.json              while unfinished: how much of the files is safely written
    index.json              when finished: the files, the tokenizer, and the key of the text
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from txtrain.data.sources.source import SPLITS, Marked, Split
from txtrain.data.store.cache import marks_of
from txtrain.data.store.formats import FORMAT, INDEX, MARKED, check_files, check_shards, shard_name, sizes_of
from txtrain.ground import files
from txtrain.ground.plain_files import check_keys, read_json

STATE = "state.json"
_EVERY = 2.0  # seconds between two saved states


class ShardWriter:
    """Files of both splits. A file ends with the document that brings it to shard_tokens, whatever was interrupted.

    The first `n_documents` of the corpus are safely in the files: skip them on resume.

    Raises:
        ConfigError: a file is shorter than what was safely written.
    """

    def __init__(self, folder: Path, key: str, vocab_size: int, shard_tokens: int, marked: bool = False) -> None:
        self.folder, self.shard_tokens, self.vocab_size, self.marked = folder, shard_tokens, vocab_size, marked
        self.dtype = np.dtype("<u2" if vocab_size < 1 << 16 else "<u4")
        self._state = _read(folder / STATE) or _fresh(key, shard_tokens)
        self.n_documents: int = self._state["n_documents"]
        self._shards: dict[Split, list[dict[str, int]]] = self._state["shards"]
        check_files(folder, self._shards, self.dtype, marked, "out", unfinished=True)
        self._open = {split: self._opened(split) for split in SPLITS}
        self._tail = dict.fromkeys(SPLITS, 0)  # tokens of an unfinished document
        self._saved = time.monotonic()

    def _opened(self, split: Split) -> tuple[BinaryIO, ...]:
        """The last files of a split, truncated to what is safely written."""
        shard, name = self._shards[split][-1], shard_name(split, len(self._shards[split]) - 1)
        opened = []
        for end, size in sizes_of(shard, self.dtype, self.marked).items():
            f = open(self.folder / f"{name}{end}", "ab")  # noqa: SIM115  (closed by _close)
            f.truncate(size)
            opened.append(f)
        return tuple(opened)

    def append(self, split: Split, ids: list[int], ends: bool) -> None:
        shard = self._shards[split][-1]
        if shard["n_tokens"] >= self.shard_tokens:
            self._next(split)
            shard = self._shards[split][-1]
        tokens, borders = self._open[split][:2]
        tokens.write(np.array(ids, dtype=self.dtype).tobytes())
        self._tail[split] += len(ids)
        if ends:
            shard["n_tokens"] += self._tail[split]
            shard["n_documents"] += 1
            borders.write(np.array([shard["n_tokens"]], dtype="<i8").tobytes())
            self._tail[split] = 0
            self.n_documents += 1

    def append_marked(self, split: Split, text: Marked) -> None:
        """A whole document."""
        trained = marks_of(text, self.vocab_size)
        self.append(split, list(text.ids), ends=True)
        *_, marks, numbers = self._open[split]
        marks.write(trained.tobytes())
        numbers.write(np.array([text.number], dtype="<i8").tobytes())

    def _next(self, split: Split) -> None:
        for f in self._open[split]:
            _sync(f)
            f.close()
        self._shards[split].append({"n_tokens": 0, "n_documents": 0})
        self._open[split] = self._opened(split)

    def save(self, now: bool = False) -> None:
        """Sync the files and save the state, at most every _EVERY seconds unless `now`."""
        if not now and time.monotonic() - self._saved < _EVERY:
            return
        for pair in self._open.values():
            for f in pair:
                _sync(f)
        files.sync(self.folder)
        self._state["n_documents"] = self.n_documents
        files.write(self.folder / STATE, json.dumps(self._state) + "\n")
        self._saved = time.monotonic()

    def finish(self, **about: Any) -> None:
        """Write index.json, which completes the folder."""
        self.save(now=True)
        self.close()
        shards = {split: self._shards[split] for split in SPLITS}
        form = MARKED if self.marked else FORMAT
        index = {"format": form, "key": self._state["key"], "dtype": self.dtype.name, **about, "shards": shards}
        files.write(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
        forget(self.folder)

    def close(self) -> None:
        for pair in self._open.values():
            for f in pair:
                f.close()

    def n_tokens(self, split: Split) -> int:
        return sum(shard["n_tokens"] for shard in self._shards[split])


def _fresh(key: str, shard_tokens: int) -> dict[str, Any]:
    return {
        "key": key, "shard_tokens": shard_tokens, "n_documents": 0,
        "shards": {split: [{"n_tokens": 0, "n_documents": 0}] for split in SPLITS},
    }


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    found = read_json(path)
    check_keys(found, str(path), {"key": str, "shard_tokens": int, "n_documents": int, "shards": dict})
    check_shards(found["shards"], str(path))
    return found


def unfinished(folder: Path) -> dict[str, Any] | None:
    """The state of an unfinished folder, with its `key` and `shard_tokens`; None if there is none."""
    return _read(folder / STATE)


def forget(folder: Path) -> None:
    """Remove state.json and the temporary files of an interrupted write."""
    for left in folder.glob("*.tmp"):
        left.unlink()
    with contextlib.suppress(FileNotFoundError):
        (folder / STATE).unlink()


def _sync(f: BinaryIO) -> None:
    f.flush()
    os.fsync(f.fileno())

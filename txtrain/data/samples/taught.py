"""A teacher's likeliest tokens beside the tokens of a folder of `txtrain prepare`.

FOLDER/
    teacher-train.ids, ...        for each token of the split the K tokens that the teacher found likeliest there
    teacher-train.log_probs, ...  float32: their log-probabilities, and that of all others together: K + 1
    teacher-state.json            while unfinished: how many rows of each split are safely written
    teacher.json                  when finished: what the teacher read, and how

The distribution for a token depends on what the teacher read before it in its row, so rows must be made as then.
"""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from txtrain.data.samples.best_fit import BestFitSamples
from txtrain.data.samples.draws import Draws
from txtrain.data.samples.order import Indices
from txtrain.data.samples.packed import PackedSamples
from txtrain.data.samples.rows import Rows
from txtrain.data.sources.source import Split
from txtrain.data.store.tokens import Tokens
from txtrain.errors import ConfigError
from txtrain.ground.plain_files import check_keys, read_json

FORMAT = "txtrain teacher 1"
DONE, STATE = "teacher.json", "teacher-state.json"


@dc.dataclass(frozen=True)
class Taught:
    """What decides a teacher's distributions: its weights, how its rows were made, and what was kept of them."""

    teacher: str
    top_k: int
    temperature: float
    seq_len: int
    packing: str
    cross_document_attention: bool

    def about(self) -> dict[str, Any]:
        return {"format": FORMAT, **dc.asdict(self)}


def arrays(folder: Path, split: Split, n_tokens: int, top_k: int, vocab_size: int, mode: str) -> tuple[Any, Any]:
    """Ids [n_tokens, K] and log-probabilities [n_tokens, K + 1], mapped. mode: r, or r+; w+ makes them.

    Raises:
        ConfigError: a file has another size.
    """
    made: list[Any] = []
    for end, dtype, width in (
        ("ids", "<u2" if vocab_size < 1 << 16 else "<u4", top_k), ("log_probs", "<f4", top_k + 1)
    ):
        path, size = folder / f"teacher-{split}.{end}", n_tokens * width * np.dtype(dtype).itemsize
        if mode != "w+" and (not path.is_file() or path.stat().st_size != size):
            raise ConfigError(f"`data.path`: {path} must have {size} bytes, but has not. Prepare again.")
        shape = (n_tokens, width)
        open_file: Any = np.memmap  # whose modes numpy's types name one by one
        made.append(open_file(path, dtype, mode, shape=shape) if size else np.zeros(shape, dtype))
    return made[0], made[1]


class TaughtSamples(Rows):
    """Rows with the teacher's distributions: teacher_ids, int64 [B, T, K], and teacher_log_probs, float32
    [B, T, K + 1]. At t stands the distribution for token t; where it is no target, anything.

    Raises:
        ConfigError: the tokens' folder has no teacher's distributions, or others.
    """

    def __init__(self, rows: Rows, tokens: Tokens, wanted: Taught, vocab_size: int) -> None:
        assert isinstance(rows, (BestFitSamples, PackedSamples))
        self.rows, self.split, self.vocab_size, self.n_tokens = rows, tokens.split, vocab_size, len(tokens)
        folders = {shard.path.parent for shard in tokens.shards}
        self.folder = next(iter(folders))
        if len(folders) > 1 or not (self.folder / DONE).is_file():
            raise ConfigError(
                f"`objective.teacher` must be given, since {self.folder} has no teacher's distributions. To write "
                "them ahead of time: txtrain prepare objective=distill objective.teacher=... objective.top_k=..."
            )
        self.top_k = wanted.top_k
        check_taught(self.folder, wanted)
        arrays(self.folder, self.split, self.n_tokens, self.top_k, vocab_size, "r")

    def __len__(self) -> int:
        return len(self.rows)

    def sources(self, rows: Indices) -> list[list[int]]:
        return self.rows.sources(rows)

    def batch(self, rows: Indices, draws: Draws) -> dict[str, Tensor]:
        ids, log_probs = arrays(self.folder, self.split, self.n_tokens, self.top_k, self.vocab_size, "r")
        places_BT = self.rows.places(rows).clip(min=0)
        found: NDArray[np.float32] = log_probs[places_BT]
        ids_BTK = ids[places_BT].astype(np.int64).clip(max=self.vocab_size - 1)
        return {
            **self.rows.batch(rows, draws), "teacher_ids": torch.from_numpy(ids_BTK),
            "teacher_log_probs": torch.from_numpy(found),
        }


def check_taught(folder: Path, wanted: Taught, name: str = DONE) -> None:
    """Raises ConfigError if the folder's distributions were made in another way. wanted.teacher "": any."""
    found = read_json(folder / name)
    kinds = {"format": str, "teacher": str, "top_k": int, "temperature": float, "seq_len": int, "packing": str}
    check_keys(found, str(folder / name), {**kinds, "cross_document_attention": bool})
    if found["format"] != FORMAT:
        raise ConfigError(f"{folder / name} must be of format {FORMAT!r}, but is of another.")
    for key, value in wanted.about().items():
        if found[key] != value and not (key == "teacher" and not value):
            group = "objective" if key in ("teacher", "top_k", "temperature") else "data"
            raise ConfigError(
                f"`{group}.{key}` must be {found[key]}, with which the teacher's distributions in {folder} were made, "
                f"but is {value} instead."
            )


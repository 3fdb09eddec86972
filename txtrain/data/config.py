"""The data group: keys of each source, and what is legal. No torch."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import Literal

from txtrain.registry import BASES, register

Tokenizer = str  # folder, file or hub name; `bytes`; `train`


@dc.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Keys that every source has. A user's own source derives from this, or gets these keys beside its constructor's."""

    type: str
    tokenizer: Tokenizer = "train"
    seq_len: int | None = None  # null: model.max_seq_len
    global_batch_size: int = 8  # sequences a step, over all processes
    micro_batch_size: int | None = None  # sequences a process at a time; null: its whole share
    cross_document_attention: bool = False
    val_fraction: float = 0.05  # of the text, where the source has no validation split of its own
    num_workers: int = 0
    cache_dir: str | None = None  # null: $TXTRAIN_CACHE, else $XDG_CACHE_HOME/txtrain, else ~/.cache/txtrain

    def check(self) -> Iterator[str]:
        for name in ("seq_len", "global_batch_size", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < (2 if name == "seq_len" else 1):
                yield f"`data.{name}` must be at least {2 if name == 'seq_len' else 1}, but is {value} instead."
        if not 0 < self.val_fraction < 1:
            yield f"`data.val_fraction` must be above 0 and below 1, but is {self.val_fraction} instead."
        if self.num_workers < 0:
            yield f"`data.num_workers` must be at least 0, but is {self.num_workers} instead."


@dc.dataclass(frozen=True, kw_only=True)
class TextConfig(DataConfig):
    """`data=text`: .txt files."""

    path: str | tuple[str, ...] | None = None  # a file, a glob, a folder (all its .txt, recursively), or a list of them
    val_path: str | tuple[str, ...] | None = None


@dc.dataclass(frozen=True, kw_only=True)
class HFConfig(DataConfig):
    """`data=hf`: whatever `datasets.load_dataset` takes."""

    path: str | None = None
    name: str | None = None
    split: str = "train"
    val_split: str | None = None  # null: `validation` where the set has it, else val_fraction of the training split
    val_path: str | None = None  # another path of load_dataset, its `val_split` or `split`
    text_column: str = "text"


@dc.dataclass(frozen=True, kw_only=True)
class WikiTextConfig(DataConfig):
    """`data=wikitext` (1609.07843): `path` if given, else Salesforce/wikitext from the hub or its cache."""

    path: str | tuple[str, ...] | None = None
    val_path: str | tuple[str, ...] | None = None
    name: Literal["wikitext-103-raw-v1", "wikitext-2-raw-v1", "wikitext-103-v1", "wikitext-2-v1"] = "wikitext-103-raw-v1"
    offline_fallback: Literal["auto", "never"] = "auto"


@dc.dataclass(frozen=True, kw_only=True)
class PythonDocsConfig(DataConfig):
    """`data=python_docs`: the help texts and docstrings that every Python installation carries."""


for name, target, config in (
    ("text", "text:TextFiles", TextConfig),
    ("hf", "hf:HubDataset", HFConfig),
    ("wikitext", "wikitext:WikiText", WikiTextConfig),
    ("python_docs", "python_docs:PythonDocs", PythonDocsConfig),
):
    register("data", name, f"txtrain.data.{target}", config)

BASES["data"] = DataConfig

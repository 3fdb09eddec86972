"""What a data source is, how it is built from its config, and what happens where data=wikitext cannot be had.

A source of text needs one method; your own takes a few lines:

    @txtrain.component("data", "mine")
    class Mine:
        def __init__(self, path: str = "notes.txt"): ...     # a key: data.path
        def documents(self, split):                          # "train"; "validation" only with has_validation = True
            yield from ...                                   # one str a document, the same ones at every call

A source of pairs of texts has `pairs(split)` instead: (source, target), both str. A source of images has `images(split)`: an object
with `labels`, int64 [N], and `read(i)`, the image as an array [H, W] or [H, W, C]. A source of anything else has `samples(split)`:
a sequence (`len`, `[i]`) of dicts of equally long lists or tensors, with `input_ids` and, if they differ, `labels`; then there is no
tokenizer. (`tokens(split)`: text that is tokens already, `memmap.py`.) What is not text says so beside its knobs:
`kind: ClassVar = "pairs"` (or "images") in its nested Config.

A source of texts of which only some tokens are trained has `marked(split, tokenizer)` beside `documents`, which then
serves to train a tokenizer alone: `Marked` texts, the same ones at every call. (`chat_template`: what the tokenizer is to
write conversations with.)

Optional in both: `has_validation` (False: `data.val_fraction` is held out), `identity()` (a str that changes with the contents; by
default all documents are hashed), `describe()` (a line for the screen), `n_bytes` (of the text, for the progress bar).
"""

from __future__ import annotations

import dataclasses as dc
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from txtrain.data.config import DataConfig, PythonDocsConfig
from txtrain.errors import ConfigError
from txtrain.registry import call, resolve
from txtrain.run_config import RunConfig

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
Run = TypeVar("Run", bound=RunConfig)


class TextSource(Protocol):
    def documents(self, split: Split) -> Iterator[str]: ...


class Marked(NamedTuple):
    """A text as tokens, each with whether it is trained. The first never is: nothing before it tells what it is.

    number: of what it came from, from 0 on, ascending; texts of one number are on one side of the split.
    """

    ids: Sequence[int]
    trained: Sequence[bool]
    number: int


class MarkedSource(TextSource, Protocol):
    def marked(self, split: Split, tokenizer: Any) -> Iterator[Marked]: ...


class Samples(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class SampleSource(Protocol):
    def samples(self, split: Split) -> Samples: ...


Source = Any  # of text, pairs, images or samples: told apart by the method that it has
METHODS = (  # but for the last three for everyone's own
    "marked",  # and `documents` beside it
    "documents",
    "pairs",
    "images",
    "samples",
    "tokens",
    "stream",
    "parts",
)


def build_source(config: RunConfig) -> Source:
    """The source that `config.data` describes. Its constructor's parameters are filled by name: from the data group, then from
    the run (`seq_len` resolved, `seed`) and the model (`vocab_size`, ...)."""
    groups = (config.model, config, config.data)
    given = {f.name: getattr(group, f.name) for group in groups for f in dc.fields(group)} | {"seq_len": config.seq_len}
    source = call("data", config.data, given)
    if method_of(source) is None:
        ways, cls = ", ".join(f"{method}(split)" for method in METHODS[1:5]), resolve("data", config.data.type)
        raise ConfigError(f"`data={config.data.type}`: {cls.__name__} must have one of the methods {ways}, but has none.")
    return source


# What a source need not say: a user's own derives from nothing.


def method_of(source: Source) -> str | None:
    """Which of METHODS a source, or its class, has."""
    return next((method for method in METHODS if hasattr(source, method)), None)


def has_validation(source: Source) -> bool:
    return bool(getattr(source, "has_validation", False))


def splits(source: Source) -> tuple[Split, ...]:
    """Those that the source itself tells apart."""
    return SPLITS if has_validation(source) else SPLITS[:1]


def n_bytes(source: Source) -> int | None:
    return getattr(source, "n_bytes", None)


def skipped(source: Source) -> dict[str, str]:
    """Where each row is that was left out, and why, once all were read."""
    return getattr(source, "skipped", None) or {}


def validation_sets(source: Source) -> dict[str, Source]:
    """A source for each validation set that has a name."""
    return source.validation_sets() if hasattr(source, "validation_sets") else {}


def describe(source: Source, name: str) -> str:
    return str(source.describe()) if hasattr(source, "describe") else name


def identity(source: Source, otherwise: Callable[[], str]) -> str:
    """What the source's contents are recognised by: its own word, if it has one."""
    return str(source.identity()) if hasattr(source, "identity") else otherwise()


def hashed(documents: Iterable[tuple[Split, str]]) -> str:
    sha = hashlib.sha256()
    for split, text in documents:
        sha.update(f"{split} {len(text)} ".encode() + text.encode())
    return sha.hexdigest()


# ------------------------------------------------------------------------------------------------------------------ fallback


def settle(config: Run) -> tuple[Run, str | None]:
    """The config to run, and why it is not the one given, if it is not.

    Where the source says that it cannot be had (`unavailable()`, data=wikitext without a hub) and `data.offline_fallback` is auto, a
    small run on one CPU trains on data=python_docs under a name that says so. Nothing larger is ever diverted.

    Raises:
        ConfigError: the data cannot be had, and this run may not fall back.
    """
    source = build_source(config)
    reason: str | None = source.unavailable() if hasattr(source, "unavailable") else None
    if reason is None:
        return config, None
    obstacle = _no_fallback(config)
    if obstacle is not None:
        raise ConfigError(f"`data={config.data.type}` cannot be had: {reason}. {obstacle} Give its files with `data.path=`, or say `data=python_docs`.")
    shared = {f.name: getattr(config.data, f.name) for f in dc.fields(DataConfig)}
    data = PythonDocsConfig(**{**shared, "type": "python_docs"})
    return dc.replace(config, data=data, name=f"{config.name}-fallback"), f"data={config.data.type} cannot be had: {reason}"


def as_named(config: Run) -> Run:
    """The same with nothing to stand in for data that cannot be had."""
    if config.data.offline_fallback == "never":
        return config
    return dc.replace(config, data=dc.replace(config.data, offline_fallback="never"))


def _no_fallback(config: RunConfig) -> str | None:
    """Why this run must have the data that it names; None if it may fall back."""
    if config.data.offline_fallback == "never":
        return "`data.offline_fallback` is never."
    if config.model.preset != config.model.family:
        return f"A stand-in is for laptop sizes only, not for {config.model.size}."
    if "SLURM_JOB_ID" in os.environ:
        return "There is no stand-in under SLURM."
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or config.trainer.devices not in ("auto", 1):
        return "There is no stand-in for a run of several processes."
    if config.trainer.accelerator != "cpu":
        import torch

        if config.trainer.accelerator == "gpu" or torch.cuda.is_available():
            return "There is no stand-in for a run on a GPU."
    return None

"""What a data source is, how it is built from its config, and the fallback of data=wikitext without a hub.

A source of text needs one method; your own takes a few lines:

    @txtrain.component("data", "mine")
    class Mine:
        def __init__(self, path: str = "notes.txt"): ...     # a key: data.path
        def documents(self, split):                          # "train"; "validation" only with has_validation = True
            yield from ...                                   # one str per document, the same ones at every call

Other methods instead of `documents`:

- `pairs(split)`: pairs of texts, (source, target), both str.
- `images(split)`: an object with `labels`, int64 [N], and `read(i)`, an array [H, W] or [H, W, C].
- `labelled(split)`: `Labelled` texts with their labels (`labels.py`); beside it `label_names` and `n_classes`.
- `samples(split)`: a sequence (`len`, `[i]`) of dicts of equally long lists or tensors, with `input_ids` and, if they
  differ, `labels`; no tokenizer is used.
- `tokens(split)`: text that is tokenised already (`memmap.py`).
- `marked(split, tokenizer)`: texts of which only some tokens are trained, as `Marked`, the same ones at every call;
  `documents` beside it then only trains the tokenizer. `chat_template` replaces the tokenizer's. `in_pairs` (False):
  they come in pairs, a preferred answer and then another one to the same prompt, for objective=dpo.
- `problems(split)`: dicts of JSON values with `question` and `answer`, both str, for objective=grpo; it has both
  splits (has_validation = True). Rewards get the whole dict; objective=sft trains `demonstration`, else the answer.

What is not text says so in its nested Config: `kind: ClassVar = "pairs"` (or "images", "problems").

Optional: `has_validation` (False: `data.val_fraction` is held out), `identity()` (a str that changes with the contents;
by default all documents are hashed), `describe()` (a line for the screen), `n_bytes` (of text, for the progress bar).
"""

from __future__ import annotations

import dataclasses as dc
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from txtrain.data.base_config import DataConfig
from txtrain.data.config import PythonDocsConfig
from txtrain.errors import ConfigError, shorten
from txtrain.registry import call, resolve
from txtrain.run_config import RunConfig

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
Run = TypeVar("Run", bound=RunConfig)


class TextSource(Protocol):
    def documents(self, split: Split) -> Iterator[str]: ...


class Marked(NamedTuple):
    """A tokenised text with a mask of trained tokens. The first token is never trained: no position predicts it.

    number: of the source item, from 0 on, ascending; texts of one item are on one side of the split.
    """

    ids: Sequence[int]
    trained: Sequence[bool]
    number: int


class MarkedSource(TextSource, Protocol):
    def marked(self, split: Split, tokenizer: Any) -> Iterator[Marked]: ...


Problem = Mapping[str, Any]  # question, answer, and what else a reward reads; JSON values


class ProblemSource(Protocol):
    def problems(self, split: Split) -> Iterator[Problem]: ...


class Samples(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class SampleSource(Protocol):
    def samples(self, split: Split) -> Samples: ...


Source = Any  # of text, pairs, images or samples: recognised by its method
METHODS = (  # in order of precedence; the last four are for our own sources
    "marked",  # and `documents` beside it
    "documents",
    "pairs",
    "problems",
    "images",
    "samples",
    "labelled",
    "questions",
    "tokens",
    "stream",
    "parts",
)


def build_source(config: RunConfig) -> Source:
    """The source of `config.data`.

    Its constructor's parameters are filled by name: from the data group, else from the run (`seq_len` resolved, `seed`)
    or the model (`vocab_size`, ...).
    """
    groups = (config.model, config, config.data)
    given = {f.name: getattr(group, f.name) for group in groups for f in dc.fields(group)}
    given["seq_len"] = config.seq_len
    given["label_names"] = given.get("label_names") or config.model.head.label_names
    source = call("data", config.data, given)
    if method_of(source) is None:
        ways, cls = ", ".join(f"{method}(split)" for method in METHODS[1:6]), resolve("data", config.data.type)
        raise ConfigError(
            f"`data={config.data.type}`: {cls.__name__} must have one of the methods {ways}, but has none."
        )
    return source


# Defaults of what is optional: a user's source has no base class.


def method_of(source: Source) -> str | None:
    """The first of METHODS that a source, or its class, has."""
    return next((method for method in METHODS if hasattr(source, method)), None)


def has_validation(source: Source) -> bool:
    return bool(getattr(source, "has_validation", False))


def splits(source: Source) -> tuple[Split, ...]:
    """The splits of the source itself."""
    return SPLITS if has_validation(source) else SPLITS[:1]


def n_bytes(source: Source) -> int | None:
    return getattr(source, "n_bytes", None)


def skipped(source: Source) -> dict[str, str]:
    """The place of each skipped row, and why it was skipped, once all rows were read."""
    found: dict[str, str] | None = getattr(source, "skipped", None)
    return {} if found is None else found


def validation_sets(source: Source) -> dict[str, Source]:
    """A source for each named validation set."""
    return source.validation_sets() if hasattr(source, "validation_sets") else {}


def describe(source: Source, name: str) -> str:
    return str(source.describe()) if hasattr(source, "describe") else name


def chat_template(source: MarkedSource) -> Any:
    """The template that replaces the tokenizer's; None: it is kept."""
    return getattr(source, "chat_template", None)


def pairs(source: MarkedSource) -> bool:
    """Whether its texts are pairs: an answer that is preferred, and one that is not."""
    return bool(getattr(source, "in_pairs", False))


def identity(source: Source, otherwise: Callable[[], str]) -> str:
    """A str that identifies the source's contents: its own, else `otherwise()`."""
    return str(source.identity()) if hasattr(source, "identity") else otherwise()


def hashed(documents: Iterable[tuple[Split, str]]) -> str:
    sha = hashlib.sha256()
    for split, text in documents:
        sha.update(f"{split} {len(text)} ".encode() + text.encode())
    return sha.hexdigest()


# ------------------------------------------------------------------------------------------------------------- fallback


def settle(config: Run) -> tuple[Run, str | None]:
    """The config to run, and why it differs from the given one; None if it does not.

    If the source is unavailable (data=wikitext without a hub) and `data.offline_fallback` is auto, a small run on one
    CPU falls back to data=python_docs, under a name that says so. Larger runs never do.

    Raises:
        ConfigError: the data are unavailable, and this run may not fall back.
    """
    source = build_source(config)
    reason: str | None = source.unavailable() if hasattr(source, "unavailable") else None
    if reason is None:
        return classified(config, source), None
    obstacle = _no_fallback(config)
    if obstacle is not None:
        raise ConfigError(
            f"`data={config.data.type}` is unavailable: {reason}. {obstacle} "
            "Give its files with `data.path=`, or say `data=python_docs`."
        )
    shared = {f.name: getattr(config.data, f.name) for f in dc.fields(DataConfig)}
    data = PythonDocsConfig(**{**shared, "type": "python_docs"})
    fallback = dc.replace(config, data=data, name=f"{config.name}-fallback")
    return fallback, f"data={config.data.type} is unavailable: {reason}"


def classified(config: Run, source: Source | None = None) -> Run:
    """The config with the classes of its data in its head, whose names leave with the model.

    Raises:
        ConfigError: model.head.n_classes is another number.
    """
    if config.data.sample_kind != "labels" or not config.model.head.pools:
        return config
    head, kind = config.model.head, config.data.kind
    if kind == head.kind == "single" and head.label_names and config.data.label_names in ((), head.label_names):
        return config  # what the rows hold is compared with these when they are read
    source = build_source(config) if source is None else source
    n, names = source.n_classes, source.label_names
    if head.n_classes not in (None, n):
        what = "the numbers" if kind == "regression" else "the classes"
        listed = f": {shorten(', '.join(names))}" if names else ""
        raise ConfigError(
            f"`model.head.n_classes` must be null or {n}, {what} of data={config.data.type}{listed}, "
            f"but is {head.n_classes} instead. Nearest: {n}."
        )
    if head.label_names and head.label_names != names:
        theirs, ours = shorten(", ".join(head.label_names)), shorten(", ".join(names))
        remedy = f"For a head of its own: model.head.n_classes={n} 'model.head.label_names=[]'"
        raise ConfigError(f"`data.label_column` must give the model's {theirs}, but gives {ours} instead. {remedy}.")
    if n == 1 and kind == "single":
        raise ConfigError(f"`data.label_column` must hold at least two classes, but all rows have {names[0]!r}.")
    head = dc.replace(head, n_classes=n, label_names=names, kind=kind)
    return dc.replace(config, model=dc.replace(config.model, head=head))


def as_named(config: Run) -> Run:
    """The same config without a fallback."""
    if config.data.offline_fallback == "never":
        return config
    return dc.replace(config, data=dc.replace(config.data, offline_fallback="never"))


def _no_fallback(config: RunConfig) -> str | None:
    """Why this run may not fall back; None if it may."""
    if config.data.offline_fallback == "never":
        return "`data.offline_fallback` is never."
    if config.model.preset != config.model.family:
        return f"The fallback is for laptop sizes only, not for {config.model.size}."
    if "SLURM_JOB_ID" in os.environ:
        return "There is no fallback under SLURM."
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or config.trainer.devices not in ("auto", 1):
        return "There is no fallback for a run of several processes."
    if config.trainer.accelerator != "cpu":
        import torch

        if config.trainer.accelerator == "gpu" or torch.cuda.is_available():
            return "There is no fallback for a run on a GPU."
    return None


def side_of(text: str, val_fraction: float) -> Split:
    """The split of all rows with this text, where the source has no validation split."""
    draw = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return "validation" if draw < val_fraction * 2**64 else "train"

"""Configs of the data group: the keys of each source, and their checks. No torch."""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from txtrain.data.base_config import DataConfig, TextsConfig, Tokenizer, UnpackedConfig
from txtrain.data.images_config import DigitsConfig, ImagesConfig
from txtrain.data.questions_config import (
    AnsweredConfig,
    ArithmeticConfig,
    ClozeConfig,
    CountdownConfig,
    MultipleChoiceConfig,
    ProblemsConfig,
)
from txtrain.registry import BASES, axes, config, knob, register


@config
class TextConfig(UnpackedConfig, TextsConfig):
    """`data=text`: text files, or files with a text in each row."""

    # A file, a glob, a folder (its .txt, .jsonl and .parquet, recursively), or a list of them.
    path: str | tuple[str, ...] | None = knob(None, literal=True)
    # As path, or a mapping of names to paths for several validation sets.
    val_path: str | tuple[str, ...] | dict[str, str] | None = None
    text_column: str = "text"  # of .jsonl and .parquet


@config
class HFConfig(TextsConfig):
    """`data=hf`: whatever `datasets.load_dataset` takes."""

    path: str | None = knob(None, literal=True)
    name: str | None = None
    split: str = "train"
    val_split: str | None = None  # null: `validation` if the set has it, else val_fraction of the training split
    val_path: str | None = None  # another path for load_dataset, of which `val_split` or `split` is read
    text_column: str = "text"
    streaming: bool = False  # read while the run goes on, without downloading or tokenising it first
    # Parts into which a stream is divided; best a multiple of the processes, each of which reads its own parts alone.
    stream_readers: int = knob(8, at_least=1, at_most=1024)
    # Rows of a stream that each reader shuffles at a time, fewer if they have more than 4 MiB; 0: the set's order.
    shuffle_buffer: int = knob(1000, at_least=0)

    def check(self) -> Iterator[str]:
        yield from super().check()
        for key in () if self.streaming else ("stream_readers", "shuffle_buffer"):
            if getattr(self, key) != getattr(type(self), key):
                yield f"`data.{key}` must not be given without data.streaming=true: nothing reads it."
        if self.streaming and self.packing != "concat":
            yield f"`data.packing` must be concat with data.streaming=true, but is {self.packing} instead."
        if self.streaming and self.num_workers > 1:  # `datasets` would divide the rows among them
            yield f"`data.num_workers` must be 0 or 1 with data.streaming=true, but is {self.num_workers} instead."
        if self.streaming and self.tokenizer == "train":
            allowed = "bytes, or a folder, file or hub name with data.streaming=true"
            yield f"`data.tokenizer` must be {allowed}, but is train instead."


def as_it_was(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration, with what 0.1.0 did where it had no key: one reader read a stream in the set's order."""
    data = saved.get("data")
    if not isinstance(data, Mapping) or data.get("streaming") is not True:
        return dict(saved)
    return {**saved, "data": {"stream_readers": 1, "shuffle_buffer": 0, **data}}


@config
class WikiTextConfig(UnpackedConfig, TextsConfig):
    """`data=wikitext` (1609.07843): `path` if given, else Salesforce/wikitext from the hub or its cache."""

    path: str | tuple[str, ...] | None = knob(None, literal=True)
    val_path: str | tuple[str, ...] | None = None
    name: Literal[
        "wikitext-103-raw-v1", "wikitext-2-raw-v1", "wikitext-103-v1", "wikitext-2-v1"
    ] = "wikitext-103-raw-v1"
    offline_fallback: Literal["auto", "never"] = "auto"


@config
class PythonDocsConfig(DataConfig):
    """`data=python_docs`: help topics and docstrings of the Python installation."""


@config
class ConversationsConfig(UnpackedConfig, TextsConfig):
    """Keys of sources of conversations in rows."""

    # Files (.json, .jsonl, .parquet), globs, folders, or a list of them; or a set for load_dataset.
    path: str | tuple[str, ...] | None = knob(None, literal=True)
    val_path: str | tuple[str, ...] | None = None
    name: str | None = None
    split: str = "train"
    val_split: str | None = None
    chat_template: str | None = knob(None, literal=True)  # a file with a Jinja template; null: the tokenizer's
    packing: Literal["best_fit", "none"] = "best_fit"  # several samples per sequence, and padding; or one


@config
class ChatConfig(ConversationsConfig):
    """`data=chat`: conversations, of which the assistant's turns are trained."""

    kind: ClassVar = "chat"

    # Format of the rows; auto: recognised by the keys of each row.
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "oasst", "self_instruct"] = "auto"
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"  # the turns whose tokens are trained


@config
class PreferencesConfig(ConversationsConfig):
    """`data=preferences`: to each prompt an answer that is preferred, and one that is not. A sequence holds both."""

    kind: ClassVar = "preferences"

    # auto: by the keys of each row, and texts with a prompt as turns if there is a chat template; text: as written.
    format: Literal["auto", "text", "oasst"] = "auto"
    # A text or a list of messages; null, or in no row: what both answers begin with.
    prompt_column: str | None = "prompt"
    chosen_column: str = "chosen"  # a text or a list of messages, with or without the prompt
    rejected_column: str = "rejected"

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.cross_document_attention:
            apart = "false with data=preferences, whose answers must not see each other"
            yield f"`data.cross_document_attention` must be {apart}, but is true instead."


@config
class MemmapConfig(DataConfig):
    """`data=memmap`: token files, ours or those of other tools."""

    also: ClassVar = ("chat", "preferences")

    # null: the tokenizer in the folder of `txtrain prepare`; none for files of other tools.
    tokenizer: Tokenizer | None = knob(None, literal=True)
    # A folder of `txtrain prepare`, files of tokens (.bin, .npy), folders and globs of them, or a list.
    path: str | tuple[str, ...] | None = knob(None, literal=True)
    val_path: str | tuple[str, ...] | None = None
    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] = "uint16"  # of files without a header


@config
class MixtureConfig(DataConfig):
    """`data=mixture`: several sources of text, each with its share of the samples."""

    mixes: ClassVar = True

    sources: dict[str, Any] = axes("data")  # by name: the `type` of the source, and its keys
    weights: dict[str, float] | None = None  # by name; null: in proportion to the sizes

    shared: ClassVar = (
        "tokenizer", "seq_len", "global_batch_size", "micro_batch_size",
        "cross_document_attention", "packing", "num_workers", "cache_dir",
    )

    def part(self, name: str) -> Any:
        """The config of a source, with the keys that it shares with the mixture."""
        return dc.replace(self.sources[name], **{key: getattr(self, key) for key in self.shared})

    def check(self) -> Iterator[str]:
        yield from DataConfig.check(self)
        if not self.sources:
            yield "`data.sources` must name at least one source: data.sources.NAME.type=text data.sources.NAME.path=..."
        for name, source in self.sources.items():
            key = f"data.sources.{name}"
            if not re.fullmatch(r"\w[\w-]*", name):
                yield f"`{key}`: a name must be of letters, digits, _ and -, but is {name!r} instead."
            if source.mixes or source.sample_kind != "text":
                yield f"`{key}.type` must be a source of text, but is {source.type} instead."
                continue
            if source.streaming:
                yield f"`{key}.streaming` must be false in a mixture, but is true instead."
            yield from (problem.replace("`data.", f"`{key}.", 1) for problem in self.part(name).check())
            for shared in self.shared:
                if getattr(source, shared) != getattr(type(source), shared):
                    remedy = f"Write data.{shared}={getattr(source, shared)}"
                    yield f"`{key}.{shared}` must not be given: it is one for all sources. {remedy}."
        yield from self._check_weights()

    def _check_weights(self) -> Iterator[str]:
        if self.weights is None:
            return
        if self.weights.keys() != self.sources.keys():
            given = ", ".join(self.weights) or "nothing"
            yield f"`data.weights` must be of {', '.join(self.sources)}, but is of {given} instead."
        for name, weight in self.weights.items():
            if not weight > 0:
                remedy = "To leave a source out: take it out of data.sources"
                yield f"`data.weights.{name}` must be above 0, but is {weight} instead. {remedy}."
        if self.weights and 0 < min(self.weights.values()) < 1e-6 * sum(self.weights.values()):
            yield f"`data.weights` must not be below a millionth of their sum, but are {self.weights} instead."


@config
class TranslationConfig(UnpackedConfig, TextsConfig):
    """`data=translation`: pairs of texts."""

    kind: ClassVar = "pairs"

    # A .tsv (or .gz); or the source sentences, with target_path beside them; or a set for load_dataset.
    path: str | None = knob(None, literal=True)
    target_path: str | None = None  # translations of the lines of data.path, line by line
    val_path: str | None = None
    val_target_path: str | None = None
    name: str | None = None
    split: str = "train"
    val_split: str | None = None
    # Source and target; null: the last two of a .tsv with 2 or 3 columns, or the only two of a set.
    columns: tuple[int, int] | tuple[str, str] | None = None
    swap: bool = False  # exchange source and target


@config
class LabelsConfig(UnpackedConfig, TextsConfig):
    """`data=labels`: texts, or pairs of them, with a class, several classes or numbers for each."""

    sample_kind: ClassVar = "labels"
    implies: ClassVar = {
        "objective": "classification", "model/head": "class", "model.logit_softcap": "null", "model.mtp_depth": "0",
    }

    # Files (.csv, .tsv, .jsonl, .json, .parquet), globs, folders, or a list of them; or a set for load_dataset.
    path: str | tuple[str, ...] | None = knob(None, literal=True)
    val_path: str | tuple[str, ...] | None = None
    name: str | None = None
    split: str = "train"
    val_split: str | None = None
    text_column: str = "text"
    text_pair_column: str | None = None  # of the second text of a pair
    # The class or number; multi: columns of 0 and 1 named as the classes, or a column of lists of names.
    label_column: str | tuple[str, ...] = "label"
    # single: one class for each text; multi: any number of classes; regression: numbers
    kind: Literal["single", "multi", "regression"] = "single"  # type: ignore[misc]
    # The classes in order; empty: the model's own, else those of the training rows, sorted.
    label_names: tuple[str, ...] = ()
    delimiter: str | None = knob(None, literal=True)  # between cells; null: a comma in .csv, a tab in .tsv

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.delimiter is not None and len(self.delimiter) != 1:
            yield f"`data.delimiter` must be null or one character, but is {self.delimiter!r} instead."
        if self.kind == "single" and not isinstance(self.label_column, str):
            given = f"is {list(self.label_column)} instead. Several columns: data.kind=multi"
            yield f"`data.label_column` must be one column with data.kind=single, but {given}."
        if not self.label_column:
            yield "`data.label_column` must name a column, but is empty instead."


@config
class ReverseConfig(DataConfig):
    """`data=reverse`: random strings, and the same strings reversed. No files."""

    kind: ClassVar = "pairs"
    scores: ClassVar = ("exact_match",)

    n_pairs: int = knob(20_000, at_least=100)
    min_length: int = knob(4, at_least=1)
    max_length: int = knob(16, at_least=1)
    symbols: Literal["digits", "letters"] = "letters"

    def check(self) -> Iterator[str]:
        yield from DataConfig.check(self)
        low, high = self.min_length, self.max_length
        if low > high:
            yield f"`data.min_length` must be at most data.max_length ({high}), but is {low} instead. Nearest: {high}."


for name, target, cls in (
    ("text", "text:TextFiles", TextConfig),
    ("hf", "hub_text:hub_source", HFConfig),
    ("wikitext", "wikitext:WikiText", WikiTextConfig),
    ("python_docs", "python_docs:PythonDocs", PythonDocsConfig),
    ("chat", "chat:Chats", ChatConfig),
    ("preferences", "preferences:Preferences", PreferencesConfig),
    ("memmap", "memmap:TokenFiles", MemmapConfig),
    ("mixture", "mixture:Mixture", MixtureConfig),
    ("translation", "translation:Translation", TranslationConfig),
    ("labels", "labels:LabelledTexts", LabelsConfig),
    ("reverse", "reverse:Reverse", ReverseConfig),
    ("multiple_choice", "questions:MultipleChoice", MultipleChoiceConfig),
    ("cloze", "questions:Cloze", ClozeConfig),
    ("questions", "questions:QuestionFiles", AnsweredConfig),
    ("arithmetic", "made_problems:Arithmetic", ArithmeticConfig),
    ("countdown", "made_problems:Countdown", CountdownConfig),
    ("problems", "problems:Problems", ProblemsConfig),
    ("images", "images:ImageFiles", ImagesConfig),
    ("digits", "digits:Digits", DigitsConfig),
):
    register("data", name, f"txtrain.data.sources.{target}", cls)

BASES["data"] = DataConfig

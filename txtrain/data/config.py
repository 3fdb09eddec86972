"""Configs of the data group: the keys of each source, and their checks. No torch."""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from txtrain.registry import BASES, axes, knob, register

Tokenizer = str  # folder, file or hub name; `bytes`; `train`


@dc.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Keys of every source. A user's own config derives from this, or the source gets these keys beside its own."""

    type: str
    tokenizer: Tokenizer | None = knob("train", literal=True)
    seq_len: int | None = knob(None, at_least=2)  # null: model.max_seq_len
    global_batch_size: int = knob(8, at_least=1)  # sequences per step, over all ranks
    # Sequences per rank and forward pass; null: the rank's whole share of the global batch.
    micro_batch_size: int | None = knob(None, at_least=1, free=True)
    cross_document_attention: bool = False
    # concat: documents are cut where a sequence ends; best_fit: whole documents and padding; none: one per sequence.
    packing: Literal["concat", "best_fit", "none"] = "concat"
    # Fraction held out for validation, if the source has no validation split.
    val_fraction: float = knob(0.05, above=0, below=1)
    num_workers: int = knob(0, at_least=0, free=True)
    # null: $TXTRAIN_CACHE, else $XDG_CACHE_HOME/txtrain, else ~/.cache/txtrain.
    cache_dir: str | None = knob(None, free=True, literal=True, from_run=lambda value: False)

    # Of samples: text, chat, preferences, pairs, problems, images, labels (`txtrain.config.compatibility`).
    kind: ClassVar[str] = "text"
    sample_kind: ClassVar[str] = "text"  # the same; data=labels has a key of the other name
    also: ClassVar[tuple[str, ...]] = ()  # further kinds that its files may turn out to hold
    # What the source asks for where the command line does not choose: key or group -> its value there.
    implies: ClassVar[Mapping[str, str]] = {}
    scores: ClassVar[tuple[str, ...]] = ("bleu", "chrf")  # metrics for generated answers to its pairs
    mixes: ClassVar[bool] = False  # consists of other sources
    streaming = False  # these two are fields of some sources only
    offline_fallback = "never"

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        owner = next(c for c in cls.__mro__ if {"kind", "sample_kind"} & vars(c).keys())
        cls.sample_kind = vars(owner).get("sample_kind", vars(owner).get("kind"))

    def check(self) -> Iterator[str]:
        if self.packing != "concat" and self.sample_kind not in ("text", "chat", "preferences"):
            where = f"data={self.type}, which is no text"
            yield f"`data.packing` must be concat with {where}, but is {self.packing} instead."
        if self.tokenizer is None and type(self).tokenizer is not None:
            yield "`data.tokenizer` must be train, bytes, or a folder, file or hub name, but is null instead."


@dc.dataclass(frozen=True, kw_only=True)
class UnpackedConfig(DataConfig):
    """A key of sources that read compressed files."""

    # Largest ratio of unpacked to compressed size (.gz, .zst, .parquet, .npz), from 64 MB on.
    max_expansion: float = knob(200.0, at_least=1, free=True)


@dc.dataclass(frozen=True, kw_only=True)
class TextsConfig(DataConfig):
    """Keys of sources that read texts of any origin."""

    # Largest size of one text: a .txt or .tsv file, a line of .jsonl, a row.
    max_text_bytes: int = knob(1 << 31, at_least=1, free=True)
    encoding_errors: Literal["strict", "replace"] = "strict"  # invalid UTF-8: an error, or replaced by U+FFFD
    # Bad rows of .jsonl, .parquet, .tsv and hub sets: an error, or skipped and listed in the run's folder.
    bad_rows: Literal["refuse", "skip"] = "refuse"


@dc.dataclass(frozen=True, kw_only=True)
class TextConfig(UnpackedConfig, TextsConfig):
    """`data=text`: text files, or files with a text in each row."""

    # A file, a glob, a folder (its .txt, .jsonl and .parquet, recursively), or a list of them.
    path: str | tuple[str, ...] | None = knob(None, literal=True)
    # As path, or a mapping of names to paths for several validation sets.
    val_path: str | tuple[str, ...] | dict[str, str] | None = None
    text_column: str = "text"  # of .jsonl and .parquet


@dc.dataclass(frozen=True, kw_only=True)
class HFConfig(TextsConfig):
    """`data=hf`: whatever `datasets.load_dataset` takes."""

    path: str | None = knob(None, literal=True)
    name: str | None = None
    split: str = "train"
    val_split: str | None = None  # null: `validation` if the set has it, else val_fraction of the training split
    val_path: str | None = None  # another path for load_dataset, of which `val_split` or `split` is read
    text_column: str = "text"
    streaming: bool = False  # read in the order of the set, without downloading or tokenising it first

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.streaming and self.packing != "concat":
            yield f"`data.packing` must be concat with data.streaming=true, but is {self.packing} instead."
        if self.streaming and self.num_workers > 1:  # `datasets` would divide the rows among them
            yield f"`data.num_workers` must be 0 or 1 with data.streaming=true, but is {self.num_workers} instead."
        for key, usual in (("encoding_errors", "strict"), ("bad_rows", "refuse")):
            if self.streaming and getattr(self, key) != usual:  # skipped rows must be known before the run
                yield f"`data.{key}` must be {usual} with data.streaming=true, but is {getattr(self, key)} instead."
        if self.streaming and self.tokenizer == "train":
            allowed = "bytes, or a folder, file or hub name with data.streaming=true"
            yield f"`data.tokenizer` must be {allowed}, but is train instead."


@dc.dataclass(frozen=True, kw_only=True)
class WikiTextConfig(UnpackedConfig, TextsConfig):
    """`data=wikitext` (1609.07843): `path` if given, else Salesforce/wikitext from the hub or its cache."""

    path: str | tuple[str, ...] | None = knob(None, literal=True)
    val_path: str | tuple[str, ...] | None = None
    name: Literal[
        "wikitext-103-raw-v1", "wikitext-2-raw-v1", "wikitext-103-v1", "wikitext-2-v1"
    ] = "wikitext-103-raw-v1"
    offline_fallback: Literal["auto", "never"] = "auto"


@dc.dataclass(frozen=True, kw_only=True)
class PythonDocsConfig(DataConfig):
    """`data=python_docs`: help topics and docstrings of the Python installation."""


@dc.dataclass(frozen=True, kw_only=True)
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


@dc.dataclass(frozen=True, kw_only=True)
class ChatConfig(ConversationsConfig):
    """`data=chat`: conversations, of which the assistant's turns are trained."""

    kind: ClassVar = "chat"

    # Format of the rows; auto: recognised by the keys of each row.
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "oasst", "self_instruct"] = "auto"
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"  # the turns whose tokens are trained


@dc.dataclass(frozen=True, kw_only=True)
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


@dc.dataclass(frozen=True, kw_only=True)
class MemmapConfig(DataConfig):
    """`data=memmap`: token files, ours or those of other tools."""

    also: ClassVar = ("chat", "preferences")

    # null: the tokenizer in the folder of `txtrain prepare`; none for files of other tools.
    tokenizer: Tokenizer | None = knob(None, literal=True)
    # A folder of `txtrain prepare`, files of tokens (.bin, .npy), folders and globs of them, or a list.
    path: str | tuple[str, ...] | None = knob(None, literal=True)
    val_path: str | tuple[str, ...] | None = None
    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] = "uint16"  # of files without a header


@dc.dataclass(frozen=True, kw_only=True)
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


@dc.dataclass(frozen=True, kw_only=True)
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


@dc.dataclass(frozen=True, kw_only=True)
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


@dc.dataclass(frozen=True, kw_only=True)
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


@dc.dataclass(frozen=True, kw_only=True)
class QuestionsConfig(UnpackedConfig, TextsConfig):
    """Keys of every source of questions, for `evaluate`."""

    # .jsonl, .json or .parquet files, globs, folders, or a list of them.
    path: str | tuple[str, ...] | None = knob(None, literal=True)
    question_column: str = "question"
    prompt: str | None = knob(None, literal=True)  # what the model reads: text with {COLUMN}s; null: the question
    separator: str = " "  # between the prompt and what follows it


@dc.dataclass(frozen=True, kw_only=True)
class MultipleChoiceConfig(QuestionsConfig):
    """`data=multiple_choice`: questions with several choices, of which one is right."""

    kind: ClassVar = "choices"

    choices_column: str = "choices"  # a list of texts, or {"text": [...], "label": [...]}
    answer_column: str = "answer"  # the number of the right choice, from 0 on; the choice itself; or its label
    # Text in the prompt that each choice replaces; what follows it is scored.
    blank: str | None = None


@dc.dataclass(frozen=True, kw_only=True)
class ClozeConfig(QuestionsConfig):
    """`data=cloze`: texts whose end is asked for."""

    kind: ClassVar = "cloze"

    question_column: str = "text"
    answer_column: str | None = None  # null: the last word of the text


@dc.dataclass(frozen=True, kw_only=True)
class AnsweredConfig(QuestionsConfig):
    """`data=questions`: questions and answers."""

    kind: ClassVar = "questions"

    answer_column: str = "answer"


@dc.dataclass(frozen=True, kw_only=True)
class ProblemsConfig(UnpackedConfig):
    """`data=problems`: questions and answers in files."""

    kind: ClassVar = "problems"

    # Files (.json, .jsonl, .parquet), globs, folders, or a list of them.
    path: str | tuple[str, ...] | None = knob(None, literal=True)
    val_path: str | tuple[str, ...] | None = None
    question_column: str | tuple[str, ...] = "question"  # several are joined by a space
    answer_column: str = "answer"
    # of samples that `predict` has written: rows with a lower `reward` are left out, and equal ones count once
    min_reward: float | None = None
    max_text_bytes: int = knob(1 << 31, at_least=1, free=True)  # largest size of a row


@dc.dataclass(frozen=True, kw_only=True)
class ArithmeticConfig(DataConfig):
    """`data=arithmetic`: chains such as 7+3*4-2=, from left to right, modulo 10. No files."""

    kind: ClassVar = "problems"

    difficulty: int = knob(5, at_least=1, at_most=64)  # operations in a chain
    n_train: int = knob(20_000, at_least=1)  # distinct problems
    n_val: int = knob(500, at_least=1)  # held out by a hash of the problem
    # share of the demonstrations (objective=sft) that write the running values; the others write the answer alone
    worked: float = knob(1.0, at_least=0, at_most=1)


@dc.dataclass(frozen=True, kw_only=True)
class CountdownConfig(DataConfig):
    """`data=countdown`: numbers, and a target to be made of them. No files."""

    kind: ClassVar = "problems"

    difficulty: int = knob(3, at_least=2, at_most=8)  # how many numbers
    n_train: int = knob(20_000, at_least=1)  # distinct problems
    n_val: int = knob(500, at_least=1)  # held out by a hash of the problem


@dc.dataclass(frozen=True, kw_only=True)
class PixelConfig(DataConfig):
    """Keys of every source of images. Images are resized to the model's image_size and n_channels."""

    kind: ClassVar = "images"

    mean: tuple[float, ...] | None = None  # per channel, of pixels from 0 to 1; null: measured on training images
    std: tuple[float, ...] | None = knob(None, above=0)
    # In training: a random crop after padding each side by so many pixels of the edge.
    crop_padding: int = knob(0, at_least=0)
    # In training: a random rotation by at most so many degrees to either side.
    rotation: float = knob(0.0, at_least=0, at_most=180)
    # In training: a random shift by at most this fraction of a side, in both directions.
    shift: float = knob(0.0, at_least=0, below=1)
    flip: bool = False  # in training: half of the images are mirrored

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.seq_len is not None:
            positions = "images, whose positions are the model's patches"
            yield f"`data.seq_len` must be null for {positions}, but is {self.seq_len} instead."


@dc.dataclass(frozen=True, kw_only=True)
class ImagesConfig(PixelConfig, UnpackedConfig):
    """`data=images`: folders, arrays, IDX files, or a hub set."""

    path: str | None = knob(None, literal=True)
    val_path: str | None = None
    labels: str | None = None  # the .npy of labels for an .npy of images
    val_labels: str | None = None
    name: str | None = None
    split: str = "train"
    val_split: str | None = None
    columns: tuple[str, str] = ("image", "label")  # of a set


@dc.dataclass(frozen=True, kw_only=True)
class DigitsConfig(PixelConfig):
    """`data=digits`: the 1,797 handwritten digits of 8 x 8 pixels in scikit-learn."""


for name, target, config in (
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
    register("data", name, f"txtrain.data.sources.{target}", config)

BASES["data"] = DataConfig

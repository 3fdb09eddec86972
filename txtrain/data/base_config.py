"""Keys of every source of data, and what they have in common. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from txtrain.registry import config, knob

Tokenizer = str  # folder, file or hub name; `bytes`; `train`


@config
class DataConfig:
    """Keys of every source. A user's own config derives from this, or the source gets these keys beside its own."""

    type: str
    tokenizer: Tokenizer | None = knob("train", literal=True)
    # Characters that tokenizer=train reads at most, evenly from the whole training text.
    tokenizer_sample: int = knob(1_000_000_000, at_least=1_000_000)
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


@config
class UnpackedConfig(DataConfig):
    """A key of sources that read compressed files."""

    # Largest ratio of unpacked to compressed size (.gz, .zst, .parquet, .npz), from 64 MB on.
    max_expansion: float = knob(200.0, at_least=1, free=True)


@config
class TextsConfig(DataConfig):
    """Keys of sources that read texts of any origin."""

    # Largest size of one text: a .txt or .tsv file, a line of .jsonl, a row.
    max_text_bytes: int = knob(1 << 31, at_least=1, free=True)
    encoding_errors: Literal["strict", "replace"] = "strict"  # invalid UTF-8: an error, or replaced by U+FFFD
    # Bad rows of .jsonl, .parquet, .tsv and hub sets: an error, or skipped and listed in the run's folder.
    bad_rows: Literal["refuse", "skip"] = "refuse"

"""A tokenised text, and who makes samples of it."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from txtrain.data.samples.best_fit import BestFitSamples
from txtrain.data.samples.packed import PackedSamples
from txtrain.data.samples.rows import Rows
from txtrain.data.store.tokens import Tokens
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.errors import ConfigError


@dc.dataclass(frozen=True)
class TokenisedText:
    """One split of a text, of which an objective makes its samples."""

    tokens: Tokens
    tokenizer: Tokenizer | None  # None: files of tokens of which nobody knows what they stand for
    seq_len: int
    cross_document_attention: bool = False
    plan: Path | None = None  # a folder that says which documents each sequence holds (data.packing=best_fit, none)

    def sequences(self, overlap: int = 1) -> Rows:
        """Packed as the run says. overlap: of neighbours, where documents are cut: 1 where a sequence's first token is no target."""
        if self.plan is None:
            return PackedSamples(self.tokens, self.seq_len, self.cross_document_attention, overlap)
        tokenizer = self.tokenizer
        pad_id = 0 if tokenizer is None else tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
        return BestFitSamples(self.tokens, self.seq_len, self.plan, pad_id, self.cross_document_attention)

    @property
    def words(self) -> Tokenizer:
        """The tokenizer, for an objective that cannot do without.

        Raises:
            ConfigError: there is none.
        """
        if self.tokenizer is None:
            raise ConfigError("`data.tokenizer` must be given with this objective, which needs tokens of its own, but is null instead.")
        return self.tokenizer


class SampleMaker(Protocol):
    """What the data ask of an objective.

    Attributes:
        special_tokens: that a tokenizer must have.
        masks: it trains the labels alone that are given.
    """

    @property
    def special_tokens(self) -> Sequence[str]: ...

    @property
    def masks(self) -> bool: ...

    def samples(self, text: TokenisedText) -> Rows: ...

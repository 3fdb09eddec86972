"""A tokenised text, and the protocol of what makes samples of it."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from txtrain.data.samples.best_fit import BestFitSamples, PreferenceSamples
from txtrain.data.samples.packed import PackedSamples
from txtrain.data.samples.rows import Rows
from txtrain.data.samples.windows import WindowSamples
from txtrain.data.store.tokens import Tokens
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.errors import ConfigError
from txtrain.run_config import Extent


@dc.dataclass(frozen=True)
class TokenisedText:
    """One split of a text, from which an objective makes its samples."""

    tokens: Tokens
    tokenizer: Tokenizer | None  # None: token files of an unknown tokenizer
    seq_len: int
    cross_document_attention: bool = False
    plan: Path | None = None  # the folder of `write_plan` (data.packing=best_fit, none)
    extent: Extent = Extent()
    overlap: bool = False  # of the plan's pieces

    def sequences(self, overlap: int = 1) -> Rows:
        """Packed by data.packing. overlap: of neighbours with concat; 1 if the first token is never a target."""
        across = self.cross_document_attention
        if self.plan is None and self.extent.rest:
            stride = self.extent.stride or self.seq_len - overlap
            return WindowSamples(self.tokens, self.seq_len, across, stride, self._pad_id)
        if self.plan is None:
            return PackedSamples(self.tokens, self.seq_len, across, overlap)
        return BestFitSamples(self.tokens, self.seq_len, self.plan, self._pad_id, across, self.overlap)

    def preferences(self) -> Rows:
        """Pairs of answers, packed by data.packing."""
        assert self.plan is not None, "checked by txtrain.data.prepare"
        return PreferenceSamples(self.tokens, self.seq_len, self.plan, self._pad_id)

    @property
    def _pad_id(self) -> int:
        tokenizer = self.tokenizer
        return 0 if tokenizer is None else tokenizer.padding_id

    @property
    def words(self) -> Tokenizer:
        """The tokenizer, for an objective that needs it.

        Raises:
            ConfigError: there is none.
        """
        if self.tokenizer is None:
            raise ConfigError(
                "`data.tokenizer` must be given with this objective, which needs special tokens, but is null instead."
            )
        return self.tokenizer


class SampleMaker(Protocol):
    """What the data need of an objective.

    Attributes:
        special_tokens: required in the tokenizer.
        masks: it trains only on the given labels, so a mask of trained tokens applies.
    """

    @property
    def special_tokens(self) -> Sequence[str]: ...

    @property
    def masks(self) -> bool: ...

    def samples(self, text: TokenisedText) -> Rows: ...

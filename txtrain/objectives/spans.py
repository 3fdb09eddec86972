"""Lengths of input and target under span corruption. No torch."""

from __future__ import annotations

import dataclasses as dc
import re

SENTINEL = re.compile(r"(<extra_id_\d+>)")  # as `sentinel` makes them


def sentinel(k: int) -> str:
    """T5's name of the token that replaces span k."""
    return f"<extra_id_{k}>"


@dc.dataclass(frozen=True)
class Lengths:
    """Lengths before and after corruption. All sequences of a run share them, so batches need no padding."""

    n_tokens: int
    n_noise: int  # tokens that are dropped
    n_spans: int

    @classmethod
    def of(cls, n_tokens: int, density: float, mean_length: float) -> Lengths:
        """As in T5's code: at least one token is dropped and one kept; neither spans nor the text between are empty."""
        n_noise = min(max(round(n_tokens * density), 1), n_tokens - 1)
        n_spans = min(max(round(n_noise / mean_length), 1), n_noise, n_tokens - n_noise)
        return cls(n_tokens, n_noise, n_spans)

    @classmethod
    def fitting(cls, seq_len: int, density: float, mean_length: float) -> Lengths | None:
        """The longest text whose input and target both fit into seq_len; None if there is none."""
        # input and target together have more than n tokens, so n stays below 2 * seq_len
        candidates = (cls.of(n, density, mean_length) for n in range(2 * seq_len, 1, -1))
        return next((c for c in candidates if max(c.input_length, c.target_length) <= seq_len), None)

    @property
    def input_length(self) -> int:
        """The kept tokens, a sentinel per span, and the end token."""
        return self.n_tokens - self.n_noise + self.n_spans + 1

    @property
    def target_length(self) -> int:
        """The spans, each after its sentinel, and the end token."""
        return self.n_noise + self.n_spans + 1

"""How long a text is once spans of it are dropped: arithmetic, without torch."""

from __future__ import annotations

import dataclasses as dc
import re

SENTINEL = re.compile(r"(<extra_id_\d+>)")  # as `sentinel` makes them


def sentinel(k: int) -> str:
    """The token that stands for span k: T5's own name of it."""
    return f"<extra_id_{k}>"


@dc.dataclass(frozen=True)
class Lengths:
    """Of one sequence before and after. Every sequence of a run has the same, so batches need no padding."""

    n_tokens: int
    n_noise: int  # tokens that are dropped
    n_spans: int

    @classmethod
    def of(cls, n_tokens: int, density: float, mean_length: float) -> Lengths:
        """As in T5's code: at least one token is dropped and one stays; no span is empty, nor what lies between two spans."""
        n_noise = min(max(round(n_tokens * density), 1), n_tokens - 1)
        n_spans = min(max(round(n_noise / mean_length), 1), n_noise, n_tokens - n_noise)
        return cls(n_tokens, n_noise, n_spans)

    @classmethod
    def fitting(cls, seq_len: int, density: float, mean_length: float) -> Lengths | None:
        """The longest sequence of which neither the corrupted input nor the target exceeds seq_len; None if there is none."""
        # Neither half of what n tokens become is always below seq_len, so n stays below 2 * seq_len.
        candidates = (cls.of(n, density, mean_length) for n in range(2 * seq_len, 1, -1))
        return next((c for c in candidates if max(c.input_length, c.target_length) <= seq_len), None)

    @property
    def input_length(self) -> int:
        """What stays, a sentinel for each span, and the end."""
        return self.n_tokens - self.n_noise + self.n_spans + 1

    @property
    def target_length(self) -> int:
        """Each span after its sentinel, and the end."""
        return self.n_noise + self.n_spans + 1

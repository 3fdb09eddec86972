"""Scores of answers against references (token ids, one reference each), from numbers that add up over answers, so that
any resampled set has its score at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.objectives.base import Numbers

Ids = Sequence[Sequence[int]]


def _metric(name: str) -> Any:
    """BLEU as sacrebleu computes it by default (Post 2018, 1804.08771), or chrF2 (Popovic 2015); 0 to 100."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return BLEU(force=True) if name == "bleu" else CHRF()


def _of_corpus(name: str, answers: Ids, references: Ids, tokenizer: Tokenizer) -> Tensor:
    texts, wanted = ([tokenizer.decode(ids) for ids in rows] for rows in (answers, references))
    rows = torch.tensor(_metric(name)._extract_corpus_statistics(texts, [wanted]), dtype=torch.float64)
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)


def _exact(answers: Ids, references: Ids, tokenizer: Tokenizer) -> Tensor:
    same = [list(a) == list(r) for a, r in zip(answers, references, strict=True)]
    return torch.tensor([[float(one), 1.0] for one in same], dtype=torch.float64)


STATISTICS: dict[str, Callable[[Ids, Ids, Tokenizer], Tensor]] = {  # [B, k]
    "exact_match": _exact,
    "bleu": lambda *given: _of_corpus("bleu", *given),
    "chrf": lambda *given: _of_corpus("chrf", *given),
}


def with_scores(found: dict[str, Numbers], sums: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """`found` with BLEU and chrF from the sums [..., k] of their statistics."""
    for name in ("bleu", "chrf"):
        if name in sums:
            of_sums, flat = _metric(name)._compute_score_from_stats, sums[name].reshape(-1, sums[name].shape[-1])
            values = [of_sums(row[:-1].astype(int).tolist()).score for row in flat]
            found[name] = np.array(values).reshape(sums[name].shape[:-1])
    return found

"""Scores of a whole set: of answers against references (token ids, one reference each), and of labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txtrain.data.tokenizer.tokenizer import Tokenizer

Ids = Sequence[Sequence[int]]
Labels = NDArray[Any]


def exact_match(answers: Ids, references: Ids, tokenizer: Tokenizer) -> float:
    """Fraction of answers that equal their reference, token by token."""
    return sum(list(a) == list(r) for a, r in zip(answers, references, strict=True)) / max(len(references), 1)


def bleu(answers: Ids, references: Ids, tokenizer: Tokenizer) -> float:
    """Corpus BLEU of the decoded texts, 0 to 100, as sacrebleu computes it by default (Post 2018, 1804.08771)."""
    from sacrebleu.metrics.bleu import BLEU

    return float(BLEU(force=True).corpus_score(_texts(answers, tokenizer), [_texts(references, tokenizer)]).score)


def chrf(answers: Ids, references: Ids, tokenizer: Tokenizer) -> float:
    """chrF2 of the decoded texts, 0 to 100 (Popovic 2015)."""
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().corpus_score(_texts(answers, tokenizer), [_texts(references, tokenizer)]).score)


def _texts(rows: Ids, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(ids) for ids in rows]


SCORES: dict[str, Callable[[Ids, Ids, Tokenizer], float]] = {"exact_match": exact_match, "bleu": bleu, "chrf": chrf}


# Of labels: arrays of all rows, as scikit-learn and scipy define the scores.


def class_scores(found: Labels, truth: Labels) -> dict[str, float]:
    """Of one class per row, [N] each. f1_macro is the mean over the classes that are found or true."""
    from sklearn.metrics import matthews_corrcoef

    return {
        "accuracy": float((found == truth).mean()), **_f1(found, truth),
        "mcc": float(matthews_corrcoef(truth, found)),
    }


def flag_scores(found: Labels, truth: Labels) -> dict[str, float]:
    """Of any number of classes per row, [N, C] of 0 and 1. accuracy: of rows with all of their classes right."""
    return {"accuracy": float((found == truth).all(axis=1).mean()), **_f1(found, truth)}


def number_scores(found: Labels, truth: Labels) -> dict[str, float]:
    """Of numbers, [N, C]: the mean over their columns; NaN where one is constant."""
    columns = list(zip(found.T, truth.T, strict=True))
    return {
        "pearson": float(np.mean([_pearson(a, b) for a, b in columns])),
        "spearman": float(np.mean([_pearson(_ranks(a), _ranks(b)) for a, b in columns])),
    }


def _f1(found: Labels, truth: Labels) -> dict[str, float]:
    from sklearn.metrics import f1_score

    return {
        f"f1_{average}": float(f1_score(truth, found, average=average, zero_division=0))
        for average in ("macro", "micro")
    }


def _pearson(a: Labels, b: Labels) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size > 0 else float("nan")


def _ranks(values: Labels) -> Labels:
    """From 1; equal values share the mean of their ranks."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    ranks: Labels = (last - (counts - 1) / 2)[where]
    return ranks

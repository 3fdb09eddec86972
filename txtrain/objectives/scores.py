"""Scores of answers against references: token ids of a whole set, one reference for each answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from txtrain.data.tokenizer.tokenizer import Tokenizer

Ids = Sequence[Sequence[int]]


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

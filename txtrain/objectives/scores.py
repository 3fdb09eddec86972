"""Scores of the labels of a whole set: arrays of all rows, as scikit-learn and scipy define the scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[Any]


def class_scores(found: Labels, truth: Labels) -> dict[str, float]:
    """Of one class per row, [N] each. f1_macro is the mean over the classes that are found or true."""
    classes, where = np.unique(np.concatenate((found, truth)), return_inverse=True)
    f, t = where[: len(found)], where[len(found) :]
    right, n_found, n_true = (np.bincount(rows, minlength=len(classes)) for rows in (t[f == t], f, t))
    return {
        "accuracy": float((found == truth).mean()), **_f1(right, n_found, n_true),
        "mcc": _matthews(right.sum(), n_found, n_true),
    }


def _matthews(right: Any, n_found: Labels, n_true: Labels) -> float:
    """The correlation of found and true classes (Gorodkin 2004); 0 where one is constant."""
    n = float(n_found.sum())
    by_chance, found, true = n_true @ n_found, n * n - float(n_found @ n_found), n * n - float(n_true @ n_true)
    return float((right * n - by_chance) / np.sqrt(found * true)) if found * true else 0.0


def flag_scores(found: Labels, truth: Labels) -> dict[str, float]:
    """Of any number of classes per row, [N, C] of 0 and 1. accuracy: of rows with all of their classes right."""
    f, t = found.astype(bool), truth.astype(bool)
    right, n_found, n_true = (flags.sum(axis=0) for flags in (f & t, f, t))
    return {"accuracy": float((found == truth).all(axis=1).mean()), **_f1(right, n_found, n_true)}


def number_scores(found: Labels, truth: Labels) -> dict[str, float]:
    """Of numbers, [N, C]: the mean over their columns; NaN where one is constant."""
    columns = list(zip(found.T, truth.T, strict=True))
    return {
        "pearson": float(np.mean([_pearson(a, b) for a, b in columns])),
        "spearman": float(np.mean([_pearson(_ranks(a), _ranks(b)) for a, b in columns])),
    }


def _f1(right: Labels, n_found: Labels, n_true: Labels) -> dict[str, float]:
    """Of counts by class; 0 for a class that is neither found nor true. (scikit-learn takes milliseconds for each of a
    thousand resampled sets.)"""
    both = n_found + n_true
    each = np.where(both > 0, 2.0 * right / np.maximum(both, 1), 0.0)
    return {"f1_macro": float(each.mean()), "f1_micro": float(2.0 * right.sum() / max(both.sum(), 1))}


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

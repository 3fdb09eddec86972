"""`...ForSequenceClassification` as a delta from the class with a language model's head. No torch."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

from txtrain.errors import ConfigError
from txtrain.hf.fields import Fields, Values, integer, short
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import linear

_PROBLEMS = {
    "single_label_classification": "single", "multi_label_classification": "multi", "regression": "regression",
}


@dc.dataclass(frozen=True)
class Classes:
    """The number of classes, which is that of their names (by default 2), the names, and what is predicted.

    null for a problem_type: transformers takes a single output for a number, and others for one class per row.
    """

    names: tuple[str, ...] = ("id2label", "num_labels", "problem_type")

    def read(self, fields: Fields) -> Values:
        labels, n, problem = (fields[name] for name in self.names)
        if labels is not None and not isinstance(labels, dict):
            raise ConfigError(f"`id2label` must be a name for each class, but is {str(labels)[:40]} instead.")
        named = 2 if labels is None else len(labels)
        if None not in (labels, n) and n != named:
            raise ConfigError(f"`num_labels` must be the number of names in id2label ({named}), but is {n} instead.")
        if problem is not None and (type(problem) is not str or problem not in _PROBLEMS):
            allowed = f"one of {', '.join(_PROBLEMS)}, or null"
            raise ConfigError(f"`problem_type` must be {allowed}, but is {short(problem)} instead.")
        number = named if n is None else integer("num_labels", n)
        kind = ("regression" if number == 1 else "single") if problem is None else _PROBLEMS[problem]
        return {"head.n_classes": number, "head.label_names": _named(labels, number), "head.kind": kind}

    def write(self, model: Values) -> Fields:
        names = model["head.label_names"] or [f"LABEL_{i}" for i in range(model["head.n_classes"])]
        problem = next(word for word, kind in _PROBLEMS.items() if kind == model["head.kind"])
        made = {"id2label": {str(i): name for i, name in enumerate(names)}, "problem_type": problem}
        return made | {"label2id": {name: i for i, name in enumerate(names)}}


def _named(labels: Mapping[str, Any] | None, n: int) -> tuple[str, ...]:
    """The names of all classes in order; none if one is missing, or all are transformers' own."""
    if not labels:  # then n is a claim alone; else it is their number
        return ()
    found: list[Any] = [labels.get(str(i)) for i in range(n)]
    whole = all(isinstance(name, str) for name in found) and found != [f"LABEL_{i}" for i in range(n)]
    return tuple(found) if whole and len(set(found)) == n else ()


CLASS_DEFAULTS = {"id2label": None, "num_labels": None, "problem_type": None}


def of_last_token(hf: HFClass, architecture: str, *unread: str) -> HFClass:
    """The class of a decoder: scores of the last token that is not padding, without a bias.

    unread: fields of the language model's head, which the class has and does not read.
    """
    base = hf.without(*unread)
    return dc.replace(
        base,
        architecture=architecture,
        parts=(*base.parts, Classes()),
        defaults={**base.defaults, **CLASS_DEFAULTS},
        fixed={
            **hf.fixed, "head.type": "class", "head.pooling": "last", "head.pooler": False, "head.bias": False,
            "head.dropout": 0.0,
        },
        rows=(*(row for row in hf.rows if row.ours != ("head",)), linear("score", "head.classifier")),
        harmless=f"{hf.harmless} {' '.join(unread)}",
        marker="score.weight",
    )

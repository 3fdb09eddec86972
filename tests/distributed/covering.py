"""Cases that meet every choice, or every pair of choices, in few runs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

Case = dict[str, str]
Met = frozenset[tuple[str, str]]


def covering(factors: Mapping[str, Sequence[str]], allowed: Callable[[Case], bool], together: int) -> list[Case]:
    """Allowed cases such that every `together` values of as many factors which an allowed case can have are met in one; the same at every call.

    Greedy: of random cases that meet something new, the one that meets the most.
    """
    draw, cases = random.Random(0), []
    open_ = set(_all(factors, together))
    while open_:
        wanted = min(open_, key=sorted)
        candidates = [case for case in _drawn(factors, wanted, draw) if allowed(case)]
        if not candidates:
            open_.discard(wanted)  # the values exclude each other
            continue
        best = max(candidates, key=lambda case: len(open_ & set(_met(case, together))))
        cases.append(best)
        open_ -= set(_met(best, together))
    return cases


def _all(factors: Mapping[str, Sequence[str]], together: int) -> Iterator[Met]:
    for names in itertools.combinations(factors, together):
        for values in itertools.product(*(factors[name] for name in names)):
            yield frozenset(zip(names, values, strict=True))


def _drawn(factors: Mapping[str, Sequence[str]], wanted: Met, draw: random.Random) -> Iterator[Case]:
    for _ in range(300):
        yield {name: draw.choice(values) for name, values in factors.items()} | dict(wanted)


def _met(case: Case, together: int) -> Iterator[Met]:
    return (frozenset(pairs) for pairs in itertools.combinations(case.items(), together))

"""data=arithmetic and data=countdown: made problems with answers that can be checked. No files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from txtrain.data.samples.draws import Draws
from txtrain.data.sources.source import Problem, Split, side_of
from txtrain.errors import ConfigError

FORMAT = "problems 2"  # part of fingerprints: raise it when a problem changes
_HELD_OUT = 1 / 8  # of all problems: which ones depends on neither n_train nor n_val
_CHUNK = 4096
_TRIES = 64  # draws for each problem that is asked for; more find none of a kind with so few


class MadeProblems:
    """Distinct problems, each a function of its number. A problem is held out by a hash of its question alone, so what
    one run validates on no other run of any size trains on.

    Raises:
        ConfigError: there are not so many problems of this difficulty.
    """

    has_validation = True
    name: ClassVar[str]

    def __init__(self, difficulty: int, n_train: int, n_val: int) -> None:
        self.difficulty = difficulty
        self.wanted: dict[Split, int] = {"train": n_train, "validation": n_val}

    def problems(self, split: Split) -> Iterator[Problem]:
        wanted, seen = self.wanted[split], set[str]()
        for start in range(0, max(_TRIES * wanted, _CHUNK), _CHUNK):
            for problem in self.made(Draws(0, "train", np.arange(start, start + _CHUNK))):  # for every seed of the run
                question = problem["question"]
                if question in seen or side_of(f"made {question}", _HELD_OUT) != split:
                    continue
                seen.add(question)
                yield problem
                if len(seen) == wanted:
                    return
        key = {"train": "n_train", "validation": "n_val"}[split]
        raise ConfigError(
            f"`data.{key}` must be at most {len(seen)}, the {split} problems found with data.difficulty="
            f"{self.difficulty}, but is {wanted} instead. Nearest: {len(seen)}, or a larger data.difficulty."
        )

    def made(self, draws: Draws) -> Iterator[Problem]:
        """The problems of these numbers."""
        raise NotImplementedError

    def identity(self) -> str:
        return f"{FORMAT} {self.name} {self.difficulty} {self.wanted['train']} {self.wanted['validation']}"

    def describe(self) -> str:
        return f"{self.wanted['train']:,} problems of {self.name}, difficulty {self.difficulty}"


class Arithmetic(MadeProblems):
    """Chains such as 7+3*4-2=, worked from left to right, modulo 10; difficulty: the number of operations.

    worked: the share of demonstrations that write the running values, 7,0,0,8; the others write the answer alone, 8.
    """

    name = "arithmetic"

    def __init__(self, difficulty: int, n_train: int, n_val: int, worked: float) -> None:
        super().__init__(difficulty, n_train, n_val)
        self.worked = worked

    def identity(self) -> str:
        return f"{super().identity()} {self.worked}"

    def made(self, draws: Draws) -> Iterator[Problem]:
        n = self.difficulty
        digits = (draws.uniform("digits", n + 1) * 10).astype(int).tolist()
        signs = (draws.uniform("signs", n) * 3).astype(int).tolist()
        works = (draws.uniform("worked", 1)[:, 0] < self.worked).tolist()
        for values, chosen, writes in zip(digits, signs, works, strict=True):
            text, value, running = str(values[0]), values[0], [str(values[0])]
            for sign, operand in zip(chosen, values[1:], strict=True):
                value = (value + operand, value - operand, value * operand)[sign] % 10
                text += "+-*"[sign] + str(operand)
                running.append(str(value))
            shown = ",".join(running) if writes else str(value)
            yield {"question": f"{text}=", "answer": str(value), "demonstration": shown}


class Countdown(MadeProblems):
    """Numbers from 1 to 99 and a target that some expression of all of them has; difficulty: how many numbers.

    The game of TinyZero (Pan et al. 2025). Any such expression is right: rewards see `numbers`.
    """

    name = "countdown"

    def identity(self) -> str:
        return f"{super().identity()} demonstrated"

    def made(self, draws: Draws) -> Iterator[Problem]:
        n = self.difficulty
        all_numbers = (1 + draws.uniform("numbers", n) * 99).astype(int).tolist()
        signs = (draws.uniform("signs", n - 1) * 4).astype(int).tolist()
        for numbers, chosen in zip(all_numbers, signs, strict=True):
            value, shown = numbers[0], str(numbers[0])
            for wanted, operand in zip(chosen, numbers[1:], strict=True):
                value, sign = _combined(value, operand, wanted)
                before = f"({shown})" if sign in "*/" and {*shown} & {*"+-"} else shown
                shown = f"{before}{sign}{operand}"
            listed = sorted(numbers)
            asked = f"Using the numbers {listed}, each of them once, create an equation that equals {value}."
            yield {"question": asked, "answer": str(value), "numbers": listed, "demonstration": shown}


def _combined(a: int, b: int, sign: int) -> tuple[int, str]:
    """a + b, a - b, a * b or a / b, and its sign; the sum where that is not an integer from 1 to 999."""
    found = (a + b, a - b, a * b, a // b if a % b == 0 else 0)[sign]
    return (found, "+-*/"[sign]) if 1 <= found <= 999 else (a + b, "+")

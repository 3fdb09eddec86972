"""What a completion is worth: rule-based rewards, and their computation in processes of their own."""

from __future__ import annotations

import ast
import inspect
import logging
import math
import multiprocessing as mp
import operator
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from txtrain.errors import ConfigError, shorten
from txtrain.ground.orphans import end_with_parent
from txtrain.model.decoding import Written
from txtrain.registry import TABLE, call, resolve
from txtrain.run_config import AnswerConfig, FormatConfig, LengthConfig, RegexConfig, RewardConfig

log = logging.getLogger(__name__)

ANSWER = "answer"  # the reward that is 1 for what is right

# From prompts, completions (texts) and samples to a number each. A sample is the problem (question, answer, ...) with
# `prompt`, and of the completion `n_tokens` and `ended` (False: cut off).
Reward = Callable[[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Sequence[float]]

_LONGEST = 200  # characters of an equation


class Answer:
    """1 if the completion's answer is the problem's, else 0. See `AnswerConfig`."""

    def __init__(self, match: str, pattern: str | None, reference_pattern: str | None) -> None:
        self.match, self.pattern, self.reference_pattern = match, pattern, reference_pattern

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], samples: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        return [float(self.is_right(text, sample)) for text, sample in zip(completions, samples, strict=True)]

    def is_right(self, completion: str, sample: Mapping[str, Any]) -> bool:
        wanted = extracted(sample["answer"], self.reference_pattern)
        if wanted is None:
            raise ValueError(f"reward.answer.reference_pattern is not in the problem's answer {sample['answer']!r}")
        given = extracted(completion, self.pattern)
        if given is None:
            return False
        match = self.match if self.match != "auto" else "equation" if "numbers" in sample else "exact"
        if match == "exact":
            return given == wanted
        if match == "equation":
            return solves(given, sample["numbers"], wanted)
        target = number(wanted)
        if target is None:
            raise ValueError(f"the problem's answer must be a number, but is {wanted!r}")
        return number(given) == target


class Format:
    """1 for `<think>...</think><answer>...</answer>`, each tag once and only white space beside them, else 0."""

    def __init__(self, tags: tuple[str, str]) -> None:
        self.parts = [f"<{end}{re.escape(tag)}>" for tag in tags for end in ("", "/")]
        first, _, second, _ = self.parts
        self.whole = re.compile(rf"\s*{first}.*{self.parts[1]}\s*{second}.*{self.parts[3]}\s*", re.DOTALL)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], samples: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        return [float(self.fits(text)) for text in completions]

    def fits(self, text: str) -> bool:
        once = all(len(re.findall(part, text)) == 1 for part in self.parts)
        return once and self.whole.fullmatch(text) is not None


class Length:
    """0 for at most `free` tokens, -1 from `free` + `over` on, linear between (DAPO, 2503.14476, equation 13)."""

    def __init__(self, free: int, over: int) -> None:
        self.free, self.over = free, over

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], samples: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        return [-min(1.0, max(0, sample["n_tokens"] - self.free) / self.over) for sample in samples]


class Regex:
    """1 for a completion that has the pattern, else 0."""

    def __init__(self, pattern: str) -> None:
        self.pattern = re.compile(pattern, re.DOTALL)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], samples: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        return [float(self.pattern.search(text) is not None) for text in completions]


# ------------------------------------------------------------------------------------------------------------- answers


def extracted(text: str, pattern: str | None) -> str | None:
    """The last place of the pattern, without white space around it; None if there is none."""
    if pattern is None:
        return text.strip()
    found = None
    for found in re.finditer(pattern, text, re.DOTALL):  # noqa: B007
        pass
    if found is None:
        return None
    return str(found[1] if found.re.groups else found[0]).strip()


_THOUSANDS = re.compile(r"(?<=\d)(,(?=(\d\d,){0,9}\d{3}(?!\d))|\s(?=\d{3}(?!\d)))")  # 1,00,000 in India
_BESIDE = re.compile(r"[$€£%]|(?<!\d)\s|\s(?!\d)")


def number(text: str) -> Fraction | None:
    """1,000.50, 1 000, $ 3, -2/3, 50 %, 7. as exact numbers; None for what is none, such as several: 3, 4 is not 34."""
    plain = _BESIDE.sub("", _THOUSANDS.sub("", text)).rstrip(".,")
    if len(plain) > _LONGEST or not re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)(/\d+)?", plain):
        return None
    above, _, below = plain.partition("/")
    divisor = int(below) if below else 1
    return Fraction(above) / divisor if divisor else None


_SIGNS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv
}


def solves(text: str, numbers: Sequence[int], target: str) -> bool:
    """Whether the expression (what follows an = is ignored) has each of the numbers once, and that value."""
    used: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
            return _SIGNS[type(node.op)](value(node.left), value(node.right))
        raise SyntaxError

    expression = text.split("=")[0].strip()
    if len(expression) > _LONGEST:
        return False
    try:
        found = value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False
    return sorted(used) == sorted(numbers) and found == number(target)


# ---------------------------------------------------------------------------------------------------------- computation


class Job(NamedTuple):
    prompt: str
    completion: str
    sample: Mapping[str, Any]


def jobs_of(problems: Sequence[Mapping[str, Any]], written: Sequence[Written], tokenizer: Any) -> list[Job]:
    """Completions, equally many of each problem, as text, for the rewards alone: training keeps the tokens."""
    made = []
    for i, row in enumerate(written):
        problem = problems[i * len(problems) // len(written)]
        sample = {**problem, "n_tokens": len(row.ids), "ended": row.ended}
        made.append(Job(problem["prompt"], tokenizer.decode(row.ids.tolist()), sample))
    return made


class Rewards:
    """The chosen rewards, as a context: `with Rewards(config) as rewards: rewards(jobs)`.

    With workers each completion is a call of its own in a forked process, which is killed at the time limit; otherwise
    a reward gets all completions at once.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config, self.names = config, config.use
        self.rewards = {name: made(config, name) for name in config.use}
        self.weights = {name: weight_of(config, name) for name in config.use}
        self._workers: list[_Worker] = []
        self.n_failed = 0

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def __call__(self, jobs: Sequence[Job]) -> list[dict[str, float]]:
        """Of each completion the value of each reward.

        Raises:
            ConfigError: with reward.on_error=stop, a reward has no finite number for a completion.
        """
        values: list[dict[str, float]] = [{} for _ in jobs]
        for name, reward in self.rewards.items():
            found = self._in_workers(name, jobs) if self.config.workers else self._here(reward, jobs)
            for value, answer, job in zip(values, found, jobs, strict=True):
                value[name] = self._checked(name, answer, job)
        return values

    def total(self, values: Mapping[str, float]) -> float:
        return sum(self.weights[name] * value for name, value in values.items())

    def _checked(self, name: str, answer: float | str, job: Job) -> float:
        """answer: a number, or why there is none."""
        if not isinstance(answer, str) and math.isfinite(answer):
            return answer
        why = answer if isinstance(answer, str) else f"it gives {answer}"
        said = f"reward {name!r} has no finite number: {why}. Completion {shorten(repr(job.completion))} of the problem"
        said = f"{said} {shorten(repr(dict(job.sample)))}"
        if self.config.on_error == "stop":
            raise ConfigError(f"`reward`: {said}. To count 0 instead: reward.on_error=zero.")
        log.warning("%s; it counts 0 (reward.on_error=zero)", said)
        self.n_failed += 1
        return 0.0

    def _here(self, reward: Reward, jobs: Sequence[Job]) -> list[float | str]:
        try:
            return [*_numbers(reward, jobs)]
        except Exception:  # a user's function: which sample was it?
            return [_one(reward, job) for job in jobs]

    def _in_workers(self, name: str, jobs: Sequence[Job]) -> list[float | str]:
        found: list[float | str] = [""] * len(jobs)
        waiting = list(reversed(range(len(jobs))))
        while len(self._workers) < min(self.config.workers, len(jobs)):
            self._workers.append(_Worker(self.rewards))
        busy: dict[_Worker, int] = {}
        while waiting or busy:
            for i, worker in enumerate(self._workers):
                if waiting and worker not in busy:
                    if not worker.is_alive:
                        worker = self._workers[i] = _Worker(self.rewards)
                    busy[worker] = waiting.pop()
                    worker.ask(name, jobs[busy[worker]])
            ready = wait([worker.pipe for worker in busy], self._patience(busy))
            for worker in [*busy]:
                answer = worker.answer(self.config.timeout, worker.pipe in ready)
                if answer is not None:
                    found[busy.pop(worker)] = answer
        return found

    def _patience(self, busy: Mapping[_Worker, int]) -> float | None:
        return None if self.config.timeout is None else max(0.0, min(w.left(self.config.timeout) for w in busy))


class _Worker:
    """A forked process that computes one reward at a time; forked, so that it has the user's functions as they are."""

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        context = mp.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, rewards, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()
        self.began = 0.0

    @property
    def is_alive(self) -> bool:
        return self.process.is_alive()

    def ask(self, name: str, job: Job) -> None:
        self.began = _now()
        self.pipe.send((name, job))

    def left(self, timeout: float) -> float:
        return self.began + timeout - _now()

    def answer(self, timeout: float | None, ready: bool) -> float | str | None:
        """A number, why there is none, or None: not yet."""
        if ready:
            try:
                answer: float | str = self.pipe.recv()
                return answer
            except (EOFError, OSError):
                self.process.join()
                return f"its process ended with {self.process.exitcode}"
        if timeout is not None and self.left(timeout) <= 0:
            self.kill()
            return f"it takes more than reward.timeout={timeout} s"
        return None

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _now() -> float:
    import time

    return time.monotonic()


def _serve(pipe: Connection, rewards: Mapping[str, Reward], parent: int) -> None:
    end_with_parent(parent=parent)
    for number_ in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the run decides when it ends
        signal.signal(number_, signal.SIG_IGN)
    while True:
        try:
            name, job = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(_one(rewards[name], job))


def _one(reward: Reward, job: Job) -> float | str:
    try:
        (value,) = _numbers(reward, [job])
    except Exception as e:  # a user's function
        return f"{type(e).__name__}: {e}"
    return value


def _numbers(reward: Reward, jobs: Sequence[Job]) -> list[float]:
    prompts, completions, samples = zip(*jobs, strict=True) if jobs else ((), (), ())
    found = [float(value) for value in reward(prompts, completions, samples)]
    if len(found) != len(jobs):
        raise ValueError(f"it must give {len(jobs)} numbers, but gives {len(found)}")
    return found


# ---------------------------------------------------------------------------------------------------------------- build

OWN_KEYS: dict[str, Callable[[RewardConfig], AnswerConfig | FormatConfig | LengthConfig | RegexConfig]] = {
    ANSWER: lambda config: config.answer,
    "format": lambda config: config.format,
    "length": lambda config: config.length,
    "regex": lambda config: config.regex,
}


def weight_of(config: RewardConfig, name: str) -> float:
    return OWN_KEYS[name](config).weight if name in OWN_KEYS else 1.0


def made(config: RewardConfig, name: str) -> Reward:
    """The reward of that name: a user's function as it is, a class with its keys, or a user's with its defaults."""
    target = resolve("reward", name)
    if inspect.isfunction(target):
        return target
    option = TABLE["reward"][name].config(type=name)
    keys = vars(OWN_KEYS[name](config)) if name in OWN_KEYS else {}
    reward: Reward = call("reward", option, {**vars(option), **keys})
    return reward

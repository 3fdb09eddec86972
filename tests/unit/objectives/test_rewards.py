"""Rewards: what is right, and what becomes of a function that raises, hangs, dies or gives no number."""

import dataclasses as dc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import txtrain
from txtrain import compose
from txtrain.config.schema import Train
from txtrain.errors import ConfigError
from txtrain.objectives.rewards import Format, Job, Rewards, extracted, number, solves
from txtrain.registry import TABLE
from txtrain.run_config import AnswerConfig, LengthConfig, RegexConfig, RewardConfig


def job(completion: str, answer: str = "7", **more: Any) -> Job:
    sample = {"question": "3+4=", "answer": answer, "prompt": "3+4=", "n_tokens": len(completion), "ended": True}
    return Job("3+4=", completion, {**sample, **more})


def values(config: RewardConfig, *jobs: Job) -> list[dict[str, float]]:
    with Rewards(config) as rewards:
        return rewards(jobs)


@pytest.fixture
def own() -> Iterator[None]:
    """Rewards of a user, registered as `imports` would."""

    @txtrain.component("reward", "strange")
    def strange(prompts: Sequence[str], completions: Sequence[str], samples: Sequence[Any]) -> list[float]:
        return [_strange(text) for text in completions]

    @txtrain.component("reward", "twice")
    class Twice:
        def __init__(self, factor: float = 2.0) -> None:
            self.factor = factor

        def __call__(self, prompts: Any, completions: Any, samples: Any) -> list[float]:
            return [self.factor * sample["n_tokens"] for sample in samples]

    yield
    for name in ("strange", "twice"):
        del TABLE["reward"][name]


def _strange(text: str) -> float:
    if text == "raise":
        raise KeyError("no such thing")
    if text == "hang":
        time.sleep(60)
    if text == "die":
        os._exit(3)
    return float("nan") if text == "nan" else 1.0


@pytest.mark.parametrize(
    ("match", "completion", "answer", "right"),
    [
        ("exact", " 7\n", "7", 1), ("exact", "7.0", "7", 0), ("numeric", "7.0", "7", 1), ("numeric", "$1,000.", "1000", 1),
        ("numeric", "1/3", "2/6", 1), ("numeric", "1/0", "1", 0), ("numeric", "about 7", "7", 0), ("numeric", "7,00", "7", 0),
    ],
)
def test_an_answer_is_the_same_text_or_the_same_number(match: Any, completion: str, answer: str, right: int) -> None:
    config = RewardConfig(answer=AnswerConfig(match=match))
    assert values(config, job(completion, answer)) == [{"answer": right}]


def test_patterns_find_the_last_answer_of_a_completion_and_of_gsm8k() -> None:
    config = RewardConfig(
        answer=AnswerConfig(match="numeric", pattern="<answer>(.*?)</answer>", reference_pattern="#### (.*)")
    )
    gold = "48/2 = <<48/2=24>>24\n#### 72"
    right = job("<answer>1</answer> no: <answer> 72 </answer>", gold)
    assert values(config, right, job("72", gold)) == [{"answer": 1}, {"answer": 0}]
    assert extracted("a1b2", r"\d") == "2"
    with pytest.raises(ConfigError, match=r"reference_pattern is not in the problem's answer '72'"):
        values(config, job("72", "72"))


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("(7 - 3) * 11", True), ("11*(7-3) = 44", True), ("11*4", False), ("7+3+11", False), ("7*3*11/11", False),
        ("(7-3)*11*1", False), ("2**9", False), ("__import__('os')", False), ("7/(3-3)", False), ("-7-3*11", False), ("", False),
        ("(" * 150, False), ("9" * 9000, False),
    ],
)
def test_an_equation_uses_each_number_once(text: str, right: bool) -> None:
    assert solves(text, [3, 7, 11], "44") is right
    assert values(RewardConfig(), job(text, "44", numbers=[3, 7, 11])) == [{"answer": float(right)}]


def test_numbers_are_exact() -> None:
    assert number("0.1") == number("1/10") != number(".1000001")
    assert number("1e5") is None
    for text in ("3, 4", "3 4", "3,4", "1,0,0", "1 0", "7,00", "1\n2", "12 34"):
        assert number(text) is None, "several numbers are not one of all their digits"
    for text in ("1,000,000", "1 000 000", " 1000000 ", "$ 1,000,000.", "10,00,000", "1,000,000.0 €", "1000000,", "1,000,000 %"):
        assert number(text) == 1_000_000
    assert number("- 2 / 3") == -number("2/3") == number("-$2/3")
    assert number("") is None


def test_format_wants_each_tag_once_and_nothing_beside() -> None:
    fits = Format(("think", "answer")).fits
    assert fits("<think>a\nb</think>\n<answer>7</answer>")
    assert not fits("so <think>a</think><answer>7</answer>")
    assert not fits("<think>a</think><answer>7</answer><answer>8</answer>")
    assert not fits("<answer>7</answer><think>a</think>")


def test_length_falls_to_minus_one_and_a_regex_is_searched() -> None:
    config = RewardConfig(
        use=("length", "regex"), length=LengthConfig(free=4, over=4, weight=0.5), regex=RegexConfig(pattern="a.c")
    )
    with Rewards(config) as rewards:
        found = rewards([job("abc"), job("a\nc56"), job("abc4567890")])
        assert found == [{"length": 0, "regex": 1}, {"length": -0.25, "regex": 1}, {"length": -1, "regex": 1}]
        assert rewards.total(found[2]) == 0.5


@pytest.mark.parametrize("workers", [0, 2])
def test_the_users_rewards_are_functions_or_classes(own: None, workers: int) -> None:
    config = RewardConfig(use=("strange", "twice", "answer"), workers=workers)
    expected = [{"strange": 1, "twice": 2 * len(text), "answer": float(text == "7")} for text in ("7", "78", "789")]
    assert values(config, job("7"), job("78"), job("789")) == expected


@pytest.mark.parametrize(
    ("bad", "workers", "said"),
    [
        ("raise", 0, "KeyError: 'no such thing'"), ("nan", 0, "it gives nan"), ("raise", 1, "KeyError"), ("nan", 1, "it gives nan"),
        ("hang", 2, r"it takes more than reward.timeout=0.5 s"), ("die", 1, "its process ended with 3"),
    ],
)
def test_a_reward_that_fails_is_named_with_its_sample(own: None, bad: str, workers: int, said: str) -> None:
    config = RewardConfig(use=("strange",), workers=workers, timeout=0.5 if workers else None)
    with pytest.raises(ConfigError, match=rf"reward 'strange' .*{said}.*Completion \"?'{bad}'.*question"):
        values(config, job("fine"), job(bad), job("fine too"))
    begin = time.monotonic()
    zero = dc.replace(config, on_error="zero")
    assert values(zero, job("fine"), job(bad), job("fine too")) == [{"strange": 1}, {"strange": 0}, {"strange": 1}]
    assert time.monotonic() - begin < 30


ENDLESS = """
from tests.unit.objectives.test_rewards import job
from txtrain.objectives.rewards import Rewards
from txtrain.run_config import RegexConfig, RewardConfig
with Rewards(RewardConfig(use=("regex",), workers=2, regex=RegexConfig(pattern="(a+)+c"))) as rewards:
    rewards([job("a" * 60 + "b")] * 2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="children end with their parent on Linux alone")
def test_workers_end_with_a_run_that_is_killed() -> None:
    run = subprocess.Popen([sys.executable, "-c", ENDLESS], env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])})
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    try:
        _wait_until(lambda: len(children.read_text().split()) == 2)
        workers = [Path("/proc", pid) for pid in children.read_text().split()]
    finally:
        run.kill()
    run.wait()
    _wait_until(lambda: not any(worker.exists() for worker in workers))


def _wait_until(so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not so():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_command_line_takes_a_list_and_further_keys(tmp_path: Path) -> None:
    made = compose(["reward=[answer,length]", "reward.length.free=9", "reward.workers=1", "reward.timeout=2"])
    assert isinstance(made, Train)
    assert made.reward.use == ("answer", "length")
    assert made.reward.timeout == 2
    assert compose(["reward=format"]).reward.use == ("format",)
    for wrong, said in (
        ("reward=[anwser]", "but has anwser instead. Did you mean answer"),
        ("reward=[length]", "`reward.length.free` must be given"),
        ("reward=[]", "must be a list of different rewards"),
        ("reward.timeout=1", "Nearest: reward.workers=1"),
        ("reward.answer.pattern='('", "is not one: missing"),
    ):
        with pytest.raises(ConfigError) as e:
            compose([wrong])
        assert said in str(e.value)

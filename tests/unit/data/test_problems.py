"""Made problems are right, distinct and held out by their question; those of files are read and divided."""

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from txtrain import compose
from txtrain.config.schema import Train
from txtrain.data.chat.template import Template
from txtrain.data.samples.prompts import PromptSamples, problem_of
from txtrain.data.sources.made_problems import Arithmetic, Countdown
from txtrain.data.sources.problems import Problems
from txtrain.data.tokenizer.tokenizer import ChatTemplate, byte_tokenizer
from txtrain.errors import ConfigError
from txtrain.objectives.rewards import solves
from txtrain.training.data_module import DataModule


def test_a_chain_is_worked_from_left_to_right_modulo_10() -> None:
    for problem in Arithmetic(4, 50, 20, 0.5).problems("train"):
        value, rest = int(problem["question"][0]), problem["question"][1:-1]
        running = [str(value)]
        assert re.fullmatch(r"\d([-+*]\d){4}=", problem["question"])
        for sign, digit in re.findall(r"([-+*])(\d)", rest):
            value = {"+": value + int(digit), "-": value - int(digit), "*": value * int(digit)}[sign]
            running.append(str(value % 10))
        assert problem["answer"] == str(value % 10)
        assert problem["demonstration"] in (",".join(running), problem["answer"])


def test_a_countdown_has_a_solution() -> None:
    def reached(values: tuple[int, ...]) -> set[float]:
        if len(values) == 1:
            return {values[0]}
        found: set[float] = set()
        for i, last in enumerate(values):
            for value in reached(values[:i] + values[i + 1 :]):
                found |= {value + last, value - last, value * last, value / last}
        return found

    for problem in Countdown(3, 40, 5).problems("train"):
        assert len(problem["numbers"]) == 3
        assert any(abs(value - int(problem["answer"])) < 1e-9 for value in reached(tuple(problem["numbers"])))
        assert solves(problem["demonstration"], problem["numbers"], problem["answer"]), problem


@pytest.mark.parametrize("kind", [partial(Arithmetic, worked=0.3), Countdown])
def test_made_problems_are_distinct_and_held_out_by_their_question_whatever_the_numbers(kind: Any) -> None:
    few, many = kind(3, 100, 30), kind(3, 3000, 400)
    train = [problem["question"] for problem in many.problems("train")]
    held_out = [problem["question"] for problem in many.problems("validation")]
    assert len(set(train)) == len(train) == 3000
    assert len(set(held_out)) == len(held_out) == 400
    assert not set(train) & set(held_out)
    assert [problem["question"] for problem in few.problems("train")] == train[:100]


def test_more_problems_than_there_are_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`data.n_train` must be at most 2\d\d, .*data.difficulty=1, but is 400"):
        list(Arithmetic(1, 400, 10, 1.0).problems("train"))


def write_gsm8k(folder: Path, n: int = 60) -> Path:
    file = folder / "train.jsonl"
    rows = [{"question": f"What is {i} and {i}?", "answer": f"So it is\n#### {2 * i}"} for i in range(n)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(path: Path, question: str | tuple[str, ...] = "question", answer: str = "answer") -> Problems:
    return Problems(str(path), None, question, answer, 0.2, 200.0, 1 << 20)


def test_problems_of_files_are_divided_by_their_question(tmp_path: Path) -> None:
    source = read(write_gsm8k(tmp_path))
    train, held_out = (list(source.problems(split)) for split in ("train", "validation"))  # type: ignore[arg-type]
    assert len(train) + len(held_out) == 60
    assert len(held_out) > 3
    assert train[0]["answer"].startswith("So it is\n#### ")
    assert not {p["question"] for p in train} & {p["question"] for p in held_out}


def test_columns_are_joined_and_a_missing_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "svamp.json"
    file.write_text(json.dumps([{"Body": "There are 3.", "Question": f"And {i}?", "Answer": 3.0 + i} for i in range(9)]))
    rows = [*read(file, ("Body", "Question"), "Answer").problems("train")]
    assert rows[0]["question"].startswith("There are 3. And ")
    assert {row["answer"] for row in rows} < {str(i) for i in range(20)}
    with pytest.raises(ConfigError, match=r"`data.answer_column` must be a column .* is answer instead.*Did you mean Answer"):
        list(read(file, "Question").problems("train"))


def test_of_samples_with_rewards_the_right_ones_are_kept_each_once(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    rows = [("1+1=", "2", 1.0), ("1+1=", "2", 1.0), ("1+1=", "1,2", 1), ("1+1=", "", 0.0), ("2+2=", "4", 1.0)]
    file.write_text("".join(json.dumps(dict(zip(("question", "text", "reward"), row, strict=True))) + "\n" for row in rows))

    def kept(**how: Any) -> list[tuple[str, str]]:
        source = Problems(str(file), None, "question", "text", 0.0, 200.0, 1 << 20, **how)
        return [(problem["question"], problem["answer"]) for problem in source.problems("train")]

    assert kept(min_reward=1.0) == [("1+1=", "2"), ("1+1=", "1,2"), ("2+2=", "4")]
    with pytest.raises(ConfigError, match="'text' must be a text or a number, but is ''"):
        kept()
    for wrong, said in (({}, "None"), ({"reward": math.nan}, "nan"), ({"reward": "1"}, "'1'")):
        file.write_text(json.dumps({"question": "1+1=", "text": "2", **wrong}) + "\n")
        with pytest.raises(ConfigError, match=f"`data.min_reward` must be null, or each row have a number `reward`, but is {said}"):
            kept(min_reward=1.0)


def test_a_prompt_begins_as_a_document_or_by_the_chat_template() -> None:
    problems = [{"question": "3+4=", "answer": "7"}, {"question": "1" * 40, "answer": "1"}]
    plain = byte_tokenizer()
    rows = PromptSamples(problems, plain, longest=20)
    batch = rows.batch(rows.kept)
    assert len(rows) == 1  # the other prompt is too long
    assert batch["input_ids"].tolist() == [[256, *b"3+4="]]
    assert problem_of(batch["problem"][0]) == {**problems[0], "prompt": "3+4="}

    template = "{% for m in messages %}{{ m.role[0] + m.content + eos_token }}{% endfor %}a"
    chatting = plain.with_template(ChatTemplate({"default": template}, "test"))
    asked = PromptSamples(problems, chatting, longest=20).batch(rows.kept)
    with Template(chatting) as t:
        assert problem_of(asked["problem"][0])["prompt"] == t.prompt([{"role": "user", "content": "3+4="}])
    assert asked["input_ids"].tolist() == [[*b"u3+4=", 256, *b"a"]]


def test_demonstrations_are_trained_behind_their_prompts() -> None:
    problems = [{"question": "3+4=", "answer": "7"}, {"question": "3+4+5=", "answer": "2", "demonstration": "7,2"}]
    batch = PromptSamples(problems, byte_tokenizer(), longest=20, answered=True).batch(np.arange(2))
    assert batch["input_ids"].tolist() == [[256, *b"3+4=7", 256, 256, 256, 256, 256], [256, *b"3+4+5=7,2", 256]]
    assert batch["labels"].tolist() == [[*[-100] * 5, *b"7", 256, *[-100] * 4], [*[-100] * 7, *b"7,2", 256]]


def test_the_data_module_reads_each_prompt_for_all_updates_of_its_rollout(tmp_path: Path) -> None:
    overrides = ["model=llama2", "model.vocab_size=257", "data=problems", f"data.path={write_gsm8k(tmp_path)}"]
    overrides += ["data.tokenizer=bytes", "data.global_batch_size=8", f"data.cache_dir={tmp_path}", "objective=grpo"]
    overrides += ["objective.beta=0", "objective.group_size=4", "objective.updates_per_rollout=4", "objective.prompts_per_rollout=4"]
    config = compose(overrides)
    assert isinstance(config, Train)
    data = DataModule(config)
    data.prepare()
    assert data.order.indices(0, 9).tolist() == [*[0, 1, 2, 3] * 4, *[4, 5, 6, 7] * 4, 8, 9, 10, 11]
    batches = iter(data.train_dataloader())
    first, second = next(batches), next(batches)
    assert first["problem"].tolist() == second["problem"].tolist()

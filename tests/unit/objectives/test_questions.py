"""Questions: the likeliest choice, the end of a text, generated answers; against transformers and by hand."""

import dataclasses as dc
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import txtrain
from tests.models import seeded
from tests.models import tiny as tiny_model
from tests.training import tiny
from txtrain import compose
from txtrain.cli.main import main
from txtrain.data.samples.questions import QuestionRows, encode
from txtrain.data.sources.questions import Cloze, MultipleChoice, Question, QuestionFiles
from txtrain.data.tokenizer.tokenizer import byte_tokenizer
from txtrain.model.position.config import DynamicScaling, RoPEConfig
from txtrain.objectives.questions import answered, read_by
from txtrain.training.evaluation import measured, reading
from txtrain.training.run import train

ROWS = [
    {"question": f"The {i}th line says that {i} times 2 is", "choices": [str(2 * i), str(3 * i + 1), f"{i}, which is"][: 2 + i % 2], "answer": i % 2}
    for i in range(1, 13)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    problems = [{"question": row["question"], "answer": row["choices"][row["answer"]]} for row in ROWS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    (folder / "cloze.jsonl").write_text("".join(json.dumps({"text": row["question"]}) + "\n" for row in ROWS))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return train(tiny(folder, f"run_dir={folder / 'run'}", "trainer.max_steps=3", "model.max_seq_len=96")).run_dir


def config(folder, run, name, *more):
    file = {"multiple_choice": "choices"}.get(name, name)
    lines = [f"checkpoint={run}", f"data={name}", f"data.path={folder / file}.jsonl", "trainer.accelerator=cpu", f"data.cache_dir={folder / 'cache'}"]
    return compose([*lines, *more], verb="evaluate")


def log_likelihood(model, before, scored):
    """By hand: the sum of log-probabilities of the bytes of `scored`, and whether each is the likeliest."""
    tokenizer = byte_tokenizer()
    first, second = [tokenizer.bos_id, *tokenizer.encode(before)], tokenizer.encode(scored)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*first, *second]])).logits[0, len(first) - 1 : -1].double()
    target = torch.tensor(second)
    return -F.cross_entropy(logits, target, reduction="sum").item(), bool((logits.argmax(-1) == target).all()), len(second)


def test_choices_are_scored_as_by_hand_whatever_the_batch(folder, run):
    model = txtrain.load_pretrained(run)
    right = {"accuracy": 0, "accuracy_per_token": 0, "accuracy_per_byte": 0}
    loss = n = 0.0
    for row in ROWS:
        found = [(*log_likelihood(model, row["question"], f" {one}"), len(one)) for one in row["choices"]]
        ways = {"accuracy": [f[0] for f in found], "accuracy_per_token": [f[0] / f[2] for f in found], "accuracy_per_byte": [f[0] / f[3] for f in found]}
        for name, scores in ways.items():
            right[name] += int(np.argmax(scores)) == row["answer"]
        loss, n = loss - found[row["answer"]][0], n + found[row["answer"]][2]
    for size in (1, 5):
        made = txtrain.evaluate(run, config(folder, run, "multiple_choice", f"data.micro_batch_size={size}"))
        assert {name: made.metrics[name].value * 12 for name in right} == pytest.approx(right)
        assert made.metrics["loss"].value == pytest.approx(loss / n, abs=1e-6)
        assert made.metrics["accuracy"].n == 12


def test_the_end_of_a_text_is_predicted_token_by_token(folder, run):
    model = txtrain.load_pretrained(run)
    found = [log_likelihood(model, row["question"].rpartition(" ")[0], " is") for row in ROWS]
    made = txtrain.evaluate(run, config(folder, run, "cloze"))
    assert made.metrics["loss"].value == pytest.approx(-sum(f[0] for f in found) / sum(f[2] for f in found), abs=1e-6)
    assert made.metrics["accuracy"].value == sum(f[1] for f in found) / 12
    assert made.metrics["bits_per_byte"].value == pytest.approx(made.metrics["loss"].value / np.log(2), rel=1e-6), "a byte is a token"


def test_answers_are_generated_and_compared(folder, run):
    with reading(config(folder, run, "questions")) as (reader, data):
        batch = reader.batch(data.sets[""], [np.arange(3)], 0)
        texts = answered(reader.model, batch, reader.tokenizer, False, 5)
        tokenizer = byte_tokenizer()
        for row, text in zip(ROWS, texts, strict=False):
            prompt = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(row["question"])]])
            alone = txtrain.generate(reader.model, prompt, max_new_tokens=5, eos_token_id=tokenizer.eos_id)[0, prompt.shape[1] :].tolist()
            assert text == tokenizer.decode(alone[: alone.index(tokenizer.eos_id)] if tokenizer.eos_id in alone else alone), "the known answer is not read"
        objective = reader.objective
        objective.pattern = __import__("re").compile(r"#### (\d+)")
        assert objective._compared("first #### 12, then #### 7 .") == objective._compared("#### 7") == "7"
    made = txtrain.evaluate(run, config(folder, run, "questions", "objective=answers", "objective.max_new_tokens=4"))
    assert made.metrics["exact_match"].value == 0.0
    assert {"loss", "perplexity", "accuracy", "exact_match"} <= set(made.metrics)
    nothing = txtrain.evaluate(run, config(folder, run, "questions", "objective=answers", "objective.max_new_tokens=2", "objective.pattern=zzz"))
    assert nothing.metrics["exact_match"].value == 0.0, "what has no answer is not right"


def test_an_answer_is_its_questions_own_and_ends_at_any_of_the_models_end_tokens():
    """Learned positions: what a short question may be answered with is not bounded by a longer neighbour."""
    small = ["model=gpt2", "data.path=x", "model.dim=16", "model.n_layers=1", "model.n_heads=2", "model.max_seq_len=32", "model.vocab_size=257"]
    tokenizer, model = byte_tokenizer(), seeded(compose([*small, "model.init.std=1"]).model).eval()
    questions = [Question(((text, " x"),), (2,), 0) for text in ("ab", "a question of 30 bytes or so", "abc", "a" * 31)]
    items = [encode(question, tokenizer, 32, False) for question in questions]

    def answers(*index):
        return answered(model, QuestionRows(items, np.arange(4), tokenizer, 32, False).batch(np.array(index)), tokenizer, False, 12)

    together, alone = answers(0, 1, 2, 3), [text for i in range(4) for text in answers(i)]
    assert together == alone
    ids = tokenizer.encode(alone[0])
    model.config = dc.replace(model.config, eos_token_id=(tokenizer.eos_id, ids[3]))
    assert answers(0) == [tokenizer.decode(ids[: ids.index(ids[3])])]


def given(cls, **how):
    source = cls.__new__(cls)
    source.__dict__ = {"question_column": "q", "answer_column": "a", "choices_column": "c", "prompt": None, "separator": " ", "blank": None} | how
    return source


def test_a_row_is_turned_by_its_own_length_whatever_the_batch():
    """Under dynamic scaling beyond model.max_seq_len, where a longer question of the batch pads it."""
    scaling = DynamicScaling(rope_type="dynamic", factor=2.0)
    model = seeded(tiny_model(vocab_size=259, max_seq_len=8, position=RoPEConfig(type="rope", scaling=scaling))).eval()
    tokenizer = byte_tokenizer()
    items = [encode(Question(tuple(("x" * n, end) for end in (" yes", " no")), (4, 3), 0), tokenizer, 64, False) for n in (9, 40)]
    rows = QuestionRows(items, np.arange(2), tokenizer, 64, False)
    both, short = (
        model(**read_by(model, rows.batch(np.arange(n)), False), return_logits=False, return_log_probs=True).log_probs.sum(1)
        for n in (2, 1)
    )
    torch.testing.assert_close(both[:2], short)


def test_fields_are_named_by_keys():
    source = given(MultipleChoice)
    assert source.question({"q": "1+1=", "c": ["2", "3"], "a": 0}, "x").answer == 0
    assert source.question({"q": "1+1=", "c": ["2", "3"], "a": "3"}, "x").answer == 1, "the choice itself"
    arc = {"q": "1+1=", "c": {"text": ["x", "y"], "label": ["A", "B"]}, "a": "B"}
    assert source.question(arc, "x") == Question((("1+1=", " x"), ("1+1=", " y")), (1, 1), 1)
    numbered = arc | {"c": {"text": ["x", "y"], "label": ["1", "2"]}, "a": "2"}
    assert source.question(numbered, "x").answer == 1, "a label, not an index"
    filled = given(MultipleChoice, blank="_").question({"q": "The _ is big, so it is seen.", "c": ["cup", "box"], "a": 1}, "x")
    assert filled.options == (("The cup", " is big, so it is seen."), ("The box", " is big, so it is seen."))
    assert given(MultipleChoice, prompt="Q: {q} ({d})\nA:").question({"q": "w", "d": 5, "c": ["2", "3"], "a": 0}, "x").options[0][0] == "Q: w (5)\nA:"
    for row, said in (({"q": "x", "c": ["2", "3"], "a": 2}, "answer_column"), ({"q": "x", "c": ["2", "3"], "a": "1" * 5000}, "answer_column"), ({"q": "x", "c": "2", "a": 0}, "choices_column"), ({"c": ["2", "3"], "a": 0}, "question_column")):
        with pytest.raises(txtrain.ConfigError, match=said):
            source.question(row, "line 1")
    with pytest.raises(txtrain.ConfigError, match=r"answer_column.*must name a text"):
        given(QuestionFiles).question({"q": "x", "a": ["y", "z"]}, "line 1")
    assert given(Cloze, answer_column=None).question({"q": "at the very end"}, "x").options == (("at the very", " end"),)


def test_a_long_question_loses_its_begin():
    tokenizer = byte_tokenizer()
    made = encode(Question((("a long question", " yes"),), (3,), 0), tokenizer, 8, False)
    assert made.options == ((tokenizer.encode("tion"), tokenizer.encode(" yes")),)
    two = encode(Question((("a long question", " yes"),), (3,), 0), tokenizer, 8, True)
    assert two.options == (([*tokenizer.encode("a long "), tokenizer.eos_id], [*tokenizer.encode("yes"), tokenizer.eos_id]),)


def test_a_batch_is_no_longer_than_the_model_has_positions():
    tokenizer = byte_tokenizer()
    for n_letters, two_stacks, width in ((40, False, 30), (40, True, 30), (9, False, 16)):
        question = Question((("a" * n_letters, " yes"), ("a", " no")), (3, 2), 0)
        rows = QuestionRows([encode(question, tokenizer, 30, two_stacks)], np.arange(1), tokenizer, 30, two_stacks)
        assert rows.batch(np.arange(1))["input_ids"].shape == (1, 2, width)


@pytest.mark.parametrize("name", ["multiple_choice", "cloze", "questions"])
def test_rows_that_are_left_out_are_counted_and_listed(folder, run, name, caplog):
    file = {"multiple_choice": "choices"}.get(name, name)
    bad = folder / f"bad_{file}.jsonl"
    bad.write_text((folder / f"{file}.jsonl").read_text() + '{"no": "question"}\n')
    asked = config(folder, run, name, f"data.path={bad}", "data.bad_rows=skip", "n_bootstrap=0")
    with reading(asked) as (reader, data):
        made = measured(asked, reader, data, {})
    assert (made.facts["n_samples"], made.facts["skipped_rows"]) == (12, 1)
    assert "1 bad rows are left out (data.bad_rows=skip), listed in" in caplog.text
    (file,) = data.skipped
    assert json.loads(file.read_text())["row"] == f"line 13 of {bad}"


def test_they_are_for_evaluation_alone(folder, capsys):
    assert main(["data=cloze", "objective=cloze", f"data.path={folder / 'cloze.jsonl'}"]) == 2
    assert "`objective` must be one that trains" in capsys.readouterr().err

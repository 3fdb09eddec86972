"""Talking: in the terminal and over a file, by the template that a run was trained with."""

import io
import json

import pytest
import torch

import txtrain
from tests.training import tiny, write_chats
from txtrain.checkpoint.load import load
from txtrain.cli import writer
from txtrain.cli.main import main
from txtrain.model.decoding import Written


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run on chats; turns are written `uHi<end>aHello<end>`."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = (*write_chats(folder), "objective=sft", "trainer.max_steps=2", "trainer.limit_val_batches=0", f"run_dir={folder / 'run'}")
    return txtrain.train(tiny(folder, *overrides)).run_dir.resolve()


@pytest.fixture
def said(run, monkeypatch):
    """Prompts that reach the generator, as text; it answers with what was put here, `!` meaning Ctrl-C."""
    tokenizer, seen, answers = load(run).tokenizer, [], ["Yes", "No", "Perhaps"]

    def answered(model, prompts, job, numbers):
        rows = []
        for prompt in prompts:
            seen.append(tokenizer.decode(prompt, special=True).replace("<|endoftext|>", "|"))
            ids = [*tokenizer.encode(answers[(len(seen) - 1) % 3]), tokenizer.eos_id]
            for token in ids if job.on_step else ():
                if token == ord("!"):
                    raise KeyboardInterrupt
                job.on_step(torch.tensor([token]))
            rows += [Written(torch.tensor(ids), torch.zeros(len(ids)), True)] * job.how.n
        return rows

    monkeypatch.setattr(writer, "continue_rows", answered)
    return seen, answers


def talk(monkeypatch, run, text, *more):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["generate", f"checkpoint={run}", "chat=true", "max_new_tokens=5", *more]) == 0


def test_each_line_is_answered_after_all_that_was_said_before(said, run, monkeypatch, capsys):
    seen, _ = said
    talk(monkeypatch, run, "Hi?\n\nSo?\n/reset\nNew\n")
    assert seen == ["uHi?|a", "uHi?|aYes|uSo?|a", "uNew|a"]
    out, err = capsys.readouterr()
    assert out == "Yes\nNo\nPerhaps\n"
    assert "tokens/s" in err


def test_ctrl_c_stops_an_answer_which_stays_as_far_as_it_came(said, run, monkeypatch, capsys):
    seen, answers = said
    answers[0] = "Ye!s"
    talk(monkeypatch, run, "Hi\nSo\n", "system=Be kind")
    assert seen == ["sBe kind|uHi|a", "sBe kind|uHi|aYe|uSo|a"]
    assert capsys.readouterr().out == "Ye\nNo\n"


def test_a_file_is_answered_in_its_order_each_sample_a_line(said, run, tmp_path, capsys):
    seen, _ = said
    talks = [
        {"messages": [{"role": "user", "content": "a long\u2028question"}]},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "reference"}]},
        {"conversations": [{"from": "human", "value": "c"}]},
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(talk, ensure_ascii=False) + "\n\n" for talk in talks))
    line = ["generate", f"checkpoint={run}", f"messages={tmp_path / 'asked.jsonl'}", "n=2", "system=T", "max_new_tokens=5"]
    assert main([*line, f"out={tmp_path / 'new' / 'answers.jsonl'}"]) == 0
    written = [json.loads(text) for text in (tmp_path / "new" / "answers.jsonl").open()]
    assert [one["index"] for one in written] == [0, 0, 1, 1, 2, 2]
    assert seen == ["sS|ub|a", "sT|uc|a", "sT|ua long\u2028question|a"], "the shortest first"
    assert written[0]["messages"] == [
        {"role": "system", "content": "T"}, *talks[0]["messages"], {"role": "assistant", "content": written[0]["text"]},
    ]
    assert [one["text"] for one in written[::2]] == ["Perhaps", "Yes", "No"]
    assert capsys.readouterr().out.endswith("answers.jsonl: 6 answers\n")
    assert main([*line, "chat=true"]) == 0
    assert [json.loads(text)["index"] for text in io.StringIO(capsys.readouterr().out)] == [0, 0, 1, 1, 2, 2]


def test_a_conversation_with_the_trained_model_ends_turns_where_training_does(run, monkeypatch, capsys, tmp_path):
    talk(monkeypatch, run, "Q3?\nQ4?\n", "temperature=0")
    out = capsys.readouterr().out
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Q3?"}]}))
    assert main(["generate", f"checkpoint={run}", f"messages={tmp_path / 'one.jsonl'}", "temperature=0", "max_new_tokens=5"]) == 0
    assert out.startswith(json.loads(capsys.readouterr().out)["text"] + "\n"), "terminal and file say the same"


def test_answers_that_cannot_be_written_are_not_begun(said, run, tmp_path, capsys):
    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    assert main(["generate", f"checkpoint={run}", f"messages={tmp_path / 'asked.jsonl'}", f"out={tmp_path}"]) == 2
    assert "`out` must be a file, but" in capsys.readouterr().err
    assert said[0] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "`messages` must be a .jsonl file with a conversation a line"),
        ("\n", "holds none"),
        ('{"messages": 1}\n', "line 1 of"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n{oops}\n', "line 2 of"),
    ],
)
def test_a_mistake_in_the_file_is_told_and_nothing_is_written(text, says, run, tmp_path, capsys):
    if text is not None:
        (tmp_path / "asked.jsonl").write_text(text)
    assert main(["generate", f"checkpoint={run}", f"messages={tmp_path / 'asked.jsonl'}", f"out={tmp_path / 'new' / 'a.jsonl'}"]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert (out, err.count("\n")) == ("", 1)
    assert not (tmp_path / "new").exists()

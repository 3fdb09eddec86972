"""`txtrain preview`: pieces, trained tokens, borders, for every objective."""

import json
import re

import numpy as np
import pytest

from tests.training import write_preferences, write_text
from txtrain.cli.main import main

SMALL = ("model.n_layers=1", "model.dim=32", "model.vocab_size=400", "data.tokenizer=bytes", "data.seq_len=40", "data.global_batch_size=4")
TEXT = ("data=text", "data.path=text.jsonl", *SMALL)


@pytest.fixture
def preview(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "4000")
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "Number {i}."}}\n' for i in range(300)))

    def run(*line: str) -> str:
        assert main(["preview", *line]) == 0
        return capsys.readouterr().out

    return run


def trained(text: str) -> list[str]:
    return re.findall("«(.*?)»", text)


def test_a_causal_model_is_trained_on_all_but_the_first_of_each_document(preview):
    first, *samples = preview("model=llama2", *TEXT, "preview.n=2").strip().split("sample ")
    assert "objective=causal_lm" in first
    assert len(samples) == 2
    head, line = samples[0].splitlines()
    pieces = re.split(" ‖ |·", line.strip())
    assert len(pieces) == 40
    assert int(re.search(r"(\d+) trained", head)[1]) == len(trained(line))
    assert line.count("‖") + 1 == int(re.search(r"(\d+) documents", head)[1])
    assert "<|endoftext|>·«N»·«u»·«m»·«b»·«e»·«r»·« »" in line
    assert f"«.»·«<|endoftext|>» ‖ <|endoftext|>·«N»" in line  # noqa: F541


def test_a_folders_name_is_shown_as_it_is(preview, tmp_path):
    """It was rich's markup, and a terminal's."""
    folder = tmp_path / "a[/b]\x1b[2J"
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text("Some words on a line.\n" * 100)
    said = preview("model=llama2", "data=text", f"data.path={folder}", *SMALL, "preview.n=1")
    assert rf"{tmp_path}/a[/b]\x1b[2J (1 file" in said


def test_preferences_are_an_object_for_each_pair(preview, tmp_path):
    """Answer by answer: prompt, answer, end; two pairs or more in a row."""
    given = (*write_preferences(tmp_path), "model=llama2", "objective=dpo", *SMALL)
    made = [json.loads(line) for line in preview(*given, "preview.format=json", "preview.n=all").splitlines()]
    assert len({pair["chosen"]["source"] for pair in made}) == len(made) > 100
    for pair in made:
        for side, begins in ((pair["chosen"], "yes"), (pair["rejected"], "no")):
            ids = side["input_ids"]
            n = side["trained"].index(True)
            assert bytes(ids[1:n]).decode() == f"Q{side['source']}"
            assert bytes(ids[n:-1]).decode().startswith(begins)
            assert all(side["trained"][n:])
            assert side["documents"] == [0] * len(ids)
    shown = preview(*given, "preview.n=1")
    assert re.search(r"chosen .*«y»·«e»·«s»", shown)
    assert re.search(r"rejected .*«n»·«o»", shown)
    assert "pairs" in shown


def test_masked_tokens_are_shown_with_what_they_hide(preview):
    out = preview("model=bert", "objective.next_sentence=false", *TEXT, "preview.n=8")
    assert re.search(r"\[MASK\]«[^»]+»", out)
    assert 0.05 < len(trained(out)) / (8 * 40) < 0.3
    pairs = preview("model=bert", *TEXT)
    assert "the second segment" in pairs
    assert "padding" in pairs


def test_corrupted_spans_are_input_and_target(preview):
    out = preview("model=t5", *TEXT, "preview.n=1")
    source, target = re.search(r"\n  input   (.*)\n  target  (.*)\n", out).groups()
    assert not trained(source)
    assert source.count("<extra_id_0>") == 1
    assert trained(target)[0] == "<extra_id_0>"
    assert trained(target)[-1] == "<|endoftext|>"


def test_pairs_are_input_and_target(preview):
    out = preview("model=transformer", "objective=seq2seq", "data=reverse", "model.n_layers=1", "model.dim=32", "model.vocab_size=300", "preview.n=1")
    source, target = re.search(r"\n  input   (.*)\n  target  (.*)\n", out).groups()
    letters = re.sub(r" \(\d+ padding\)", "", source).split("·")
    assert trained(target)[:-1] == letters[:-1][::-1]


def test_a_prefix_is_not_trained(preview):
    out = preview("model=gpt2", "objective=prefix_lm", *TEXT, "preview.n=1")
    n = int(re.search(r"the first (\d+) seen", out)[1])
    assert not trained("·".join(re.split(" ‖ |·", out.splitlines()[-1])[:n]))


def test_images_are_drawn(preview):
    out = preview("model=vit", "data=digits", "objective=image_classification", "preview.n=1")
    head, *rows = out.splitlines()[1:]
    assert re.match(r"sample 0: class \d, \d channels? of \d+ x \d+|sample 0: class \d, \d channels of", head)
    assert len({len(row) for row in rows}) == 1
    assert len(set("".join(rows))) > 4


def test_colours_are_for_those_who_see_them(preview, monkeypatch):
    line = ("model=llama2", *TEXT, "preview.n=1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[1;32m" in preview(*line)
    assert "«" not in preview(*line)
    monkeypatch.setenv("NO_COLOR", "1")
    out = preview(*line)
    assert "32m" not in out
    assert trained(out)


def test_validation_can_be_seen_and_text_without_a_tokenizer_is_numbers(preview, tmp_path):
    write_text(tmp_path / "text.txt")
    assert "; validation, " in preview("model=llama2", *TEXT, "preview.split=validation")
    (tmp_path / "a.bin").write_bytes(bytes(range(200)) * 40)
    out = preview("model=llama2", "data=memmap", "data.path=a.bin", "data.seq_len=8", "preview.n=1", "model.vocab_size=60000")
    assert re.search(r"\n  \d+·«\d+»·", out)


def test_json_has_an_object_a_line(preview):
    line = ("model=llama2", *TEXT, "preview.format=json")
    made = [json.loads(line) for line in preview(*line, "preview.n=all", "preview.split=val").splitlines()]
    assert len(made) > 3
    assert all(len(one["input_ids"]) == len(one["trained"]) == len(one["documents"]) == 40 for one in made)
    assert all(not trained for one in made for trained, new in zip(one["trained"], [True, *np.diff(one["documents"])], strict=True) if new)
    assert {n for one in made for n in np.atleast_1d(one["source"])} in (set(range(n)) for n in range(12, 16))  # the end is left out
    single = json.loads(preview(*line, "data.packing=none", "preview.n=1"))
    assert single["trained"] == [False] + [True] * (len(single["input_ids"]) - 1)
    assert isinstance(single["source"], int)
    pair = json.loads(preview("model=transformer", "data=reverse", "model.n_layers=1", "model.vocab_size=300", "preview.n=1", line[-1]))
    assert pair["decoder_input_ids"][1:] == [i if i >= 0 else 0 for i in pair["labels"]][:-1]


def test_a_mistake_is_told(capsys):
    assert main(["preview", "data=python_docs", "preview.n=0"]) == 2
    assert "`preview.n` must be at least 1 or all, but is 0 instead." in capsys.readouterr().err

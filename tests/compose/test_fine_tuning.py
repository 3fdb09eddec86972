"""Each command of docs/fine-tuning.md, as it stands there, in a folder with small files of the names that it uses."""

import json
import re
import shlex

import pytest

from tests.compose.conftest import ROOT
from tests.training import write_text
from txtrain.cli.main import main

PAGE = (ROOT / "docs/fine-tuning.md").read_text()
SECTIONS = {
    part.partition("\n")[0]: [line for block in re.findall(r"^```sh\n(.*?)^```", part, re.M | re.S) for line in block.splitlines()]
    for part in re.split(r"^##+ ", PAGE, flags=re.M)
}
COMMANDS = {title: [line for line in lines if not line.startswith("#")] for title, lines in SECTIONS.items() if lines}
BY_DEFAULT = ("Where the weights differ from the model", "Distillation")
SHORT = ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.limit_val_batches=1", "trainer.accelerator=cpu", "data.global_batch_size=2"]
APPENDED = {"train": [*SHORT, "sample.n=0"], "generate": ["max_new_tokens=4"]}  # by verb: what makes it short
SMALL = ["model.n_layers=2", "model.dim=32", "model.n_heads=2"]
WEIGHTS = {  # by name in the page
    "FOLDER": ["model=llama2", "model.max_seq_len=128", "data=text", "data.path=notes.txt"],
    "TEACHER": ["model=llama2", "model.max_seq_len=64", "data=text", "data.path=notes.txt"],
    "GPT2": ["model=gpt2", "model.max_seq_len=64", "data=text", "data.path=notes.txt"],
    "BERT": ["model=bert", "model.max_seq_len=128", "data=text", "data.path=texts"],
    "T5": ["model=t5", "model.max_seq_len=64", "data=text", "data.path=texts"],
    "MARIAN": ["model=transformer", "model.position.layout=halves", "model.max_seq_len=64", "data=translation", "data.path=pairs.tsv"],
    "VIT": [
        "model=vit", "model.max_seq_len=17", "model.embedding.image_size=28", "model.embedding.patch_size=7", "model.head.n_classes=2",
        "data=images", "data.path=photos",
    ],
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else '\n') }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_files(folder):
    from PIL import Image

    lines = write_text(folder / "notes.txt").read_text().splitlines()
    for name, n in (("texts", 20), ("books", 4), ("photos/cat", 12), ("photos/dog", 12)):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            if name.startswith("photos"):
                Image.new("L", (40, 30), 9 * i).save(folder / name / f"{i}.png")
            else:
                (folder / name / f"{i}.txt").write_text("\n".join(lines[20 * i : 20 * i + 20] * (50 if name == "books" else 1)))
    rows = [{"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"It is {i}."}]} for i in range(120)]
    preferred = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No."} for i in range(120)]
    asked = [{"messages": row["messages"][:1]} for row in rows[:2]]
    for name, objects in (("chats", rows), ("pairs", preferred), ("questions", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in objects))
    (folder / "pairs.tsv").write_text("".join(f"the {i}th line\tla ligne {i} et {i * i}\n" for i in range(120)))
    (folder / "reviews.csv").write_text("text,label\n" + "".join(f"film {i},{'good' if i % 2 else 'bad'}\n" for i in range(120)))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with all that the page names: texts, chats, images, and weights as Hugging Face has them."""
    folder = tmp_path_factory.mktemp("desk")
    write_files(folder)
    return folder


@pytest.fixture
def at_the_desk(desk, clean_room, monkeypatch):
    """at_the_desk(words): the files and the weights that they name, in the working directory."""

    def lay_out(words):
        for name in WEIGHTS:
            if any(name in word for word in words) and not (desk / name).exists():
                make_weights(name, desk, monkeypatch)
        for file in desk.iterdir():
            (clean_room / file.name).symlink_to(file)

    return lay_out


def make_weights(name, desk, monkeypatch):
    with monkeypatch.context() as there:
        there.chdir(desk)
        assert main([*SMALL, *WEIGHTS[name], *SHORT, "sample.n=0", f"run_dir=run of {name}"]) == 0
        assert main(["export", f"checkpoint=run of {name}", f"out={name}"]) == 0
    if name in ("FOLDER", "TEACHER"):
        (desk / name / "chat_template.jinja").write_text(TEMPLATE)


@pytest.mark.parametrize("title", [t if t in BY_DEFAULT else pytest.param(t, marks=pytest.mark.slow) for t in COMMANDS])
def test_the_commands_of_a_section_work_one_after_the_other(title, at_the_desk, capsys):
    commands = [shlex.split(line, comments=True) for line in COMMANDS[title]]
    at_the_desk([word for words in commands for word in words])
    for words in commands:
        assert words[0] == "txtrain", words
        verb = words[1] if "=" not in words[1] else "train"
        assert main([*words[1:], *APPENDED.get(verb, [])]) == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"


def test_every_command_of_the_page_is_in_a_block_that_is_run():
    assert PAGE.count("\ntxtrain ") == sum(len(lines) for lines in COMMANDS.values())
    assert set(BY_DEFAULT) <= set(COMMANDS)
    assert len(COMMANDS) >= 9

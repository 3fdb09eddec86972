"""`evaluate` and `predict` under every strategy: the figures and the rows of one process."""

import json
import subprocess
import sys

import pytest

from tests.training import tiny
from txtrain.cli.main import main
from txtrain.training.run import train

STRATEGIES = ("ddp", "fsdp", "tp", "deepspeed_stage_1", "deepspeed_stage_3")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("under_strategies")
    rows = [{"text": f"Line {i} of a text, {'and more ' * (i % 7)}."} for i in range(27)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [{"question": f"Two times {i} is", "answer": str(2 * i)} for i in range(7)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    train(tiny(folder, f"run_dir={folder / 'run'}", "trainer.max_steps=3", "model.vocab_size=264", "model.max_seq_len=48"))
    return folder


def lines(folder, verb, out, *words):
    return [verb, f"checkpoint={folder / 'run'}", "trainer.accelerator=cpu", f"out={folder / out}", f"data.cache_dir={folder / 'cache'}", *words]


def run(folder, *words):
    done = subprocess.run([sys.executable, "-m", "txtrain", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


TEXT = ("data=text", "data.path={}/rows.jsonl", "stride=7", "data.seq_len=24")
ANSWERS = ("data=questions", "data.path={}/problems.jsonl", "objective=answers", "objective.max_new_tokens=5", "objective.pattern=[a-z]")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_figures_and_rows_are_those_of_one_process(folder, strategy, capsys):
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    for name, words in (("text", TEXT), ("answers", ANSWERS)):
        given = [word.format(folder) for word in words]
        if not (folder / f"{name}.json").exists():
            assert main(lines(folder, "evaluate", f"{name}.json", *given)) == 0
        run(folder, *lines(folder, "evaluate", f"{name}_{strategy}.json", *given, f"strategy={strategy}", "trainer.devices=2", "data.micro_batch_size=3"))
        wanted, found = (json.loads((folder / file).read_text())["metrics"] for file in (f"{name}.json", f"{name}_{strategy}.json"))
        assert {key: one["n"] for key, one in wanted.items()} == {key: one["n"] for key, one in found.items()}
        for key, one in wanted.items():
            for part in ("value", "low", "high"):
                assert found[key][part] == pytest.approx(one[part], rel=2e-6), (key, part)
    given = ["data=text", f"data.path={folder / 'rows.jsonl'}", "max_new_tokens=4"]
    if not (folder / "texts.jsonl").exists():
        assert main(lines(folder, "predict", "texts.jsonl", *given)) == 0
    run(folder, *lines(folder, "predict", f"{strategy}.jsonl", *given, f"strategy={strategy}", "trainer.devices=2", "data.micro_batch_size=3"))
    assert (folder / f"{strategy}.jsonl").read_text() == (folder / "texts.jsonl").read_text()

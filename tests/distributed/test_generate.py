"""`txtrain generate` under a strategy says what one process says: rows are divided, and end at different times."""

import subprocess

import pytest

import txtrain
from tests.distributed.group import command_line
from tests.training import tiny

PROMPTS = ["The 1", "The 22th line says that 22 times", "x", "The 4th", "7 is"]
STRATEGIES = [
    pytest.param(f"strategy={name}", marks=pytest.mark.slow) for name in ("fsdp", "ddp", "tp", "deepspeed_stage_3")
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return txtrain.train(tiny(folder, "trainer.max_steps=30", "trainer.limit_val_batches=0", f"run_dir={folder / 'run'}")).run_dir


def said(run, *more: str) -> subprocess.CompletedProcess[str]:
    line = ["generate", f"checkpoint={run}", f"prompt_file={run.parent / 'prompts.txt'}", "max_new_tokens=12", "n=3", "temperature=1.2"]
    return command_line([*line, "batch_size=4", "stop=[is]", "accelerator=cpu", *more], run.parent)


@pytest.fixture(scope="module")
def alone(run):
    return said(run).stdout


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_say_what_one_says(strategy, run, alone):
    done = said(run, strategy, "devices=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone
    assert len(alone.splitlines()) >= 3 * len(PROMPTS)
    assert done.stderr.count("tokens/s") == 1, "one process tells the rate"


@pytest.mark.slow
def test_beams_and_mistakes_of_two_processes(run):
    done = said(run, "strategy=fsdp", "devices=2", "num_beams=3", "temperature=null")
    assert (done.returncode, done.stdout) == (0, said(run, "num_beams=3", "temperature=null").stdout), done.stderr
    done = command_line(["generate", "checkpoint=nope", "prompt=x", "devices=2"], run.parent)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr

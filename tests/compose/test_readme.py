"""The README's first block after its two commands, line by line."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.compose.conftest import ROOT
from tests.training import write_text
from txtrain import compose, generate, load_pretrained
from txtrain.cli.main import main
from txtrain.monitor.metrics_csv import read
from txtrain.training.run import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## From a plan to a folder that others load", 1)[1]
BLOCK = re.search(r"```\n(.*?)```", SECTION, re.DOTALL)[1].splitlines()
PYTHON = re.search(r"```python\n(.*?)```", SECTION, re.DOTALL)[1]
SMALL = (  # what a laptop trains for a quarter of an hour, in seconds
    *("data=text", "data.path=text.txt", "data.tokenizer=train", "model.vocab_size=300", "model.n_layers=2", "model.dim=32", "model.n_heads=2"),
    *("data.seq_len=32", "data.val_fraction=0.1", "trainer.accelerator=cpu", "trainer.max_steps=120", "trainer.limit_val_batches=1", "sample.n=0"),
)
ELSEWHERE = """
import json
ids = tokenizer("The 7th line says that 7 times 0 is", return_tensors="pt").input_ids
assert sys.modules["txtrain"] is None
print(json.dumps({"text": text[0].tolist(), "prompt": tokenizer("The ").input_ids, "ids": ids.tolist(), "logits": model(ids).logits.tolist()}))
"""


def test_the_block_is_the_first_after_the_two_commands():
    between = README.split("## Two commands", 1)[1].split(SECTION[:40], 1)[0]
    assert re.findall(r"```\n(.*?)\n```", between, re.DOTALL) == [
        "pip install -e . && txtrain model=mistral data=wikitext", 'pip install -e ".[test]" && pytest',
    ]
    assert BLOCK[0] == "txtrain plan model=gpt2 model/position=rope model/ffn=swiglu model.norm_position=sandwich"


@pytest.mark.slow
def test_the_block_runs(clean_room, capsys):
    """Each line as it stands; the training's has a small shape and a text added."""
    write_text(Path("text.txt"))
    lines = [shlex.split(line, comments=True) for line in BLOCK]
    assert [line[:2] for line in lines[2:4]] == [["kill", "-9"], ["txtrain", "resume=runs/graft"]]
    plan, training, _, resume, export, speak = lines
    assert re.search(r"in all +4,230,016 ", ran(capsys, plan))
    assert training.pop() == "&"
    begun_and_killed(training)
    run = Path("runs/graft")
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    assert 20 <= int(read(run / "metrics.csv")[-1]["step"]) < 120
    ran(capsys, resume)
    whole = train(compose([*training[1:], *SMALL, "strategy=auto", "trainer.devices=1", "run_dir=runs/whole"]))
    told, undisturbed = (json.loads((folder / "run.json").read_text()) for folder in (run, whole.run_dir))
    assert (told["status"], told["step"]) == ("complete", 120)
    assert told["data_order_hash"] == undisturbed["data_order_hash"]
    losses = [[float(row["loss"]) for row in read(folder / "metrics.csv")] for folder in (run, whole.run_dir)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    assert "modeling_txtrain.py" in ran(capsys, export)
    said = ran(capsys, speak)
    found = loaded_without_txtrain(clean_room)
    ours = load_pretrained(run)
    with torch.no_grad():
        logits = ours(input_ids=torch.tensor(found["ids"])).logits
    assert torch.allclose(logits, torch.tensor(found["logits"]), rtol=0, atol=1e-5 * logits.abs().max().item())
    assert generate(ours, torch.tensor([found["prompt"]]), max_new_tokens=20)[0].tolist() == found["text"]
    assert said.startswith("The ")


def ran(capsys, command):
    """What a command prints."""
    assert command[0] == "txtrain"
    capsys.readouterr()
    assert main(command[1:]) == 0
    return capsys.readouterr().out


def begun_and_killed(command):
    """Start the training, and kill -9 what was started, as `$!` means it, some steps after its first checkpoint."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = subprocess.Popen([sys.executable, "-m", "txtrain", *command[1:], *SMALL], env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not list(Path("runs/graft/checkpoints").glob("step_*/complete")):
        assert started.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()


def loaded_without_txtrain(home):
    """What the README's lines give in an interpreter that cannot import txtrain."""
    blocked = "import sys\nsys.modules['txtrain'] = None\n"
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(home / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    code = blocked + PYTHON + ELSEWHERE
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, env=environment, cwd=home, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

"""A run that version 0.1.0 left goes on bit for bit, and speaks. Its code is taken from this repository's history."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.training import RUN, TINY, rows, weights, write_text
from txtrain.checkpoint.load import load_pretrained

ROOT = Path(__file__).parents[2]
COMMIT = "3afd7d8"  # the last one with the files of 0.1.0
STEPS, STOP = 10, 6


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The package as it was."""
    found = subprocess.run(["git", "archive", COMMIT, "txtrain", "conf", "recipes"], cwd=ROOT, capture_output=True)
    if found.returncode != 0:
        pytest.skip(f"the history of this repository is not here: {found.stderr.decode().strip()}")
    folder = tmp_path_factory.mktemp("0.1.0")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def run(code, *line):
    env = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "txtrain", *line], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("ema.decay=0.9", "optimizer=muon"), ("model/ffn=moe", "model.ffn.n_experts=4", "model.ffn.top_k=2")])
def test_a_run_of_version_0_1_0_goes_on_bit_for_bit(more, old, clean_room):
    text = write_text(clean_room / "text.txt")
    line = [*TINY, *RUN, f"data.path={text}", "scheduler=constant", "save.every_n_steps=3", "trainer.val_check_interval=3", *more]
    run(old, *line, "run_dir=whole", f"trainer.max_steps={STEPS}")
    run(old, *line, "run_dir=parts", f"trainer.max_steps={STOP}")
    run(ROOT, "resume=parts", f"trainer.max_steps={STEPS}")
    assert rows(clean_room / "parts") == rows(clean_room / "whole")
    assert weights(clean_room / "parts") == weights(clean_room / "whole")


@pytest.mark.slow
def test_a_run_of_version_0_1_0_generates_what_it_did(old, clean_room):
    text = write_text(clean_room / "text.txt")
    run(old, *TINY, *RUN, f"data.path={text}", "run_dir=run", "logger=wandb", "logger.mode=disabled")
    line = ("generate", "checkpoint=run", "prompt=The ", "temperature=0", "max_new_tokens=20")
    assert run(ROOT, *line) == run(old, *line)
    assert load_pretrained(clean_room / "run").config.n_layers == 2
    run(ROOT, "resume=run", "trainer.max_steps=13")

"""The installed command: a wheel, unpacked elsewhere, run from an empty folder."""

import csv
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.compose.conftest import ROOT
from txtrain.config.paths import options

pytest.importorskip("hatchling", reason="building a wheel needs hatchling, which is in the test extra")


def call(*command: object, folder: Path, **env: str) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=folder, env=os.environ | env, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", ROOT, "--no-deps", "--no-build-isolation", "-q", "-w", folder, folder=folder)
    return next(folder.glob("txtrain-*.whl"))


@pytest.fixture
def installed(wheel, clean_room):
    """installed("model=gpt2", ...) runs the command of the wheel in an empty folder, where it is the only txtrain there is."""
    site = clean_room.parent / f"{clean_room.name}-site"
    call(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, folder=clean_room)

    def run(*args: str) -> str:
        return call(site / "bin/txtrain", *args, folder=clean_room, PYTHONPATH=str(site))

    return run


def test_the_wheel_carries_every_option_and_recipe_and_no_test(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
    assert {f"txtrain/recipes/{recipe}.yaml" for recipe in options("recipes")} <= names
    assert {f"txtrain/conf/model/{model}.yaml" for model in options("model")} <= names
    assert "txtrain/model/few_rows.cpp" in names
    assert not [name for name in names if not name.startswith("txtrain")]


def test_help_of_the_installed_command_lists_what_is_in_the_wheel(installed):
    text = installed("train", "--help")
    assert "gpt2_python_docs" in text
    assert "mistral_7b" in text


def test_the_installed_command_trains_from_an_empty_folder(installed, clean_room):
    small = ["model.n_layers=1", "model.dim=64", "model.n_heads=4", "model.vocab_size=512", "model.max_seq_len=64", "trainer.limit_val_batches=1"]
    said = installed("model=llama2", "data=python_docs", "trainer.max_steps=5", "trainer.log_every_n_steps=1", *small)
    (run,) = (clean_room / "runs/llama2-python_docs").iterdir()
    with (run / "metrics.csv").open() as f:
        assert [row["step"] for row in csv.DictReader(f)] == ["1", "2", "3", "4", "5"]
    assert (run / "checkpoints/step_00000005").is_dir()
    assert said.rstrip().endswith(f"done: {run.relative_to(clean_room)}")
    assert {p.name for p in clean_room.iterdir()} == {"runs", ".cache"}  # .cache: $TXTRAIN_CACHE here

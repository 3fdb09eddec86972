"""What CI runs is what the README tells a stranger to run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = 'pip install -e ".[test]" && pytest'


@pytest.mark.parametrize("file", ["README.md", ".ci/run"])
def test_the_test_command_stands_on_a_line_of_its_own(file):
    assert (ROOT / file).read_text().splitlines().count(COMMAND) == 1


def test_ci_can_be_run():
    assert os.access(ROOT / ".ci/run", os.X_OK)


def said(*command: str) -> str:
    """What a checker writes of the whole project; nothing where it finds nothing."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_ruff_finds_nothing():
    assert not said("ruff", "check", ".")


def test_mypy_finds_nothing():
    """With `strict` for all of txtrain, as pyproject.toml says. What it has checked before is kept in .mypy_cache."""
    assert not said("mypy", "txtrain")

"""What CI runs is what the README tells a stranger to run."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = 'pip install -e ".[test]" && pytest'


@pytest.mark.parametrize("file", ["README.md", ".ci/run"])
def test_the_test_command_stands_on_a_line_of_its_own(file):
    assert (ROOT / file).read_text().splitlines().count(COMMAND) == 1


def test_ci_can_be_run():
    assert os.access(ROOT / ".ci/run", os.X_OK)

"""The helper that starts processes for these tests: what fails is shown, nothing waits for ever, nothing stays behind."""

import sys
import time
from pathlib import Path

import pytest

from tests.distributed import group
from tests.distributed.group import alive

WAITS = "import os, pathlib, sys, time; pathlib.Path(f'pid-{os.environ[\"RANK\"]}').write_text(str(os.getpid())); "


def python(folder, code, n=2, **named):
    return group.run(["bash", "-c", 'cd "$0" && exec "$@"', str(folder), sys.executable, "-c", WAITS + code], n, folder, **named)


def left(folder):
    return [pid for file in sorted(Path(folder).glob("pid-*")) if alive(pid := int(file.read_text()))]


def test_the_workers_traceback_is_shown_and_the_others_are_ended(tmp_path):
    begun = time.monotonic()
    with pytest.raises(AssertionError) as told:
        python(tmp_path, "1 / 0 if os.environ['RANK'] == '1' else time.sleep(600)")
    assert time.monotonic() - begun < 120
    assert "exit code 1" in str(told.value)
    assert "=== process 1\nTraceback (most recent call last)" in str(told.value)
    assert "ZeroDivisionError" in str(told.value)
    assert len(list(tmp_path.glob("pid-*"))) == 2
    assert not left(tmp_path)


def test_a_group_that_hangs_is_ended_and_says_so(tmp_path):
    begun = time.monotonic()
    with pytest.raises(AssertionError, match=r"longer than 6 s(.|\n)*=== process 0\nhere I wait"):
        python(tmp_path, "print('here I wait', flush=True); time.sleep(600)", timeout=6)
    assert time.monotonic() - begun < 120
    assert not left(tmp_path)


def test_an_exit_code_that_is_not_the_expected_one_is_told(tmp_path):
    assert "process 1" in python(tmp_path, "sys.exit(3)", ends_with=3)
    with pytest.raises(AssertionError, match="exit code 0"):
        python(tmp_path, "pass", ends_with=2)

"""Two processes never write one run's folder."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.training import tiny
from txtrain.checkpoint import run_folder
from txtrain.errors import ConfigError
from txtrain.ground import files

HOLD = "import sys, time; from txtrain.ground import files; held = files.lock(sys.argv[1]); print(held is not None, flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.3)


def test_a_lock_is_held_by_one_and_leaves_no_file(tmp_path):
    release = files.lock(tmp_path)
    assert files.lock(tmp_path) is None
    release()
    again = files.lock(tmp_path)
    assert again is not None
    del again  # forgotten, not given back
    assert files.lock(tmp_path) is not None
    assert not list(tmp_path.iterdir())


def test_kill_9_gives_the_lock_back(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "True\n"
    assert files.lock(tmp_path) is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert files.lock(tmp_path) is not None


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path):
    config = tiny(tmp_path, f"run_dir={tmp_path / 'run'}")
    first, second = run_folder.choose(config), run_folder.choose(config)
    first.create(config, {"who": "first"})
    with pytest.raises(ConfigError, match="another one is training in"):
        second.create(config, {"who": "second"})
    assert '"who": "first"' in (tmp_path / "run/run.json").read_text()
    first.end("complete")
    second.create(config, {"who": "second"})


def test_a_checkpoint_that_came_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    config = tiny(tmp_path, f"run_dir={tmp_path / 'run'}")
    place = run_folder.choose(config)
    monkeypatch.setattr(run_folder.checkpoint, "complete", lambda path: [path / "checkpoints/step_00000004"])
    with pytest.raises(ConfigError, match="since this one looked"):
        place.create(config, {})
    monkeypatch.undo()
    place.create(config, {})


KEEP = "import sys, time; from txtrain.ground import files\nwith files.scratch() as f: (f / 'x').touch(); print(f, flush=True); time.sleep(60)"


def test_a_temporary_folder_is_removed_also_after_kill_9_but_not_while_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    child = subprocess.Popen([sys.executable, "-c", KEEP], stdout=subprocess.PIPE, text=True, env=environment)
    theirs = Path(child.stdout.readline().strip())
    (tmp_path / "txtrain-file").touch()  # none of ours
    (tmp_path / "txtrain-link").symlink_to("/")
    with files.scratch() as ours:
        assert {theirs, ours} < set(tmp_path.iterdir())
    assert theirs.exists()
    assert not ours.exists()
    child.kill()
    child.wait()
    with files.scratch():
        assert not theirs.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["txtrain-file", "txtrain-link"]

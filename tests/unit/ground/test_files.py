"""Two processes never write one run's folder; what is to be written is tried before the work."""

import errno
import fcntl
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import txtrain
from tests.models import seeded
from tests.models import tiny as small
from tests.training import tiny
from txtrain.checkpoint import run_folder
from txtrain.data.tokenizer.tokenizer import byte_tokenizer
from txtrain.errors import ConfigError
from txtrain.ground import files
from txtrain.training.part_file import PartFile

HOLD = "import sys, time; from pathlib import Path; from txtrain.ground import files; held = files.lock(Path(sys.argv[1])); print(held is not None, flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.3)


def test_a_lock_is_held_by_one_and_leaves_an_empty_file(tmp_path):
    release = files.lock(tmp_path)
    assert files.lock(tmp_path) is None
    release()
    again = files.lock(tmp_path)
    assert again is not None
    del again  # forgotten, not given back
    assert files.lock(tmp_path) is not None
    assert [(p.name, p.stat().st_size) for p in tmp_path.iterdir()] == [(".lock", 0)]


@pytest.fixture
def between_hosts(monkeypatch):
    """Locks as NFS and Lustre have them for other hosts: of files that are open for writing alone."""
    real = fcntl.flock

    def flock(handle, how):
        if stat.S_ISDIR(os.fstat(handle).st_mode) or fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "no such lock")
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_folder_is_locked_where_hosts_share_it(tmp_path, between_hosts):
    held = files.lock(tmp_path)
    assert held is not None
    assert files.lock(tmp_path) is None
    with files.locked(tmp_path) as ours:
        assert not ours


def test_a_lock_that_is_another_users_file_is_tried_on_this_host(tmp_path, monkeypatch):
    """In a folder that a group shares; where the file cannot even be made, the folder's rights are the cause."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "closed").mkdir()
    (tmp_path / "shared/.lock").touch()
    real = os.open

    def of_another(path, flags, *more):
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", of_another)
    held = files.lock(tmp_path / "shared")
    assert held is not None
    assert files.lock(tmp_path / "shared") is None
    with pytest.raises(PermissionError):
        files.lock(tmp_path / "closed")


def test_a_lock_that_is_no_file_is_refused(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"\.lock must be an empty file, .* but is a link"):
        files.lock(tmp_path)
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "folder/.lock").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"\.lock must be an empty file, .* but is a folder"):
        files.lock(tmp_path / "folder")


def test_processes_of_earlier_versions_are_seen_and_see_ours(tmp_path, monkeypatch):
    """They lock the folder itself, and would train in it, or lose their scratch folder, while the version changes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder, how = tmp_path / "txtrain-earlier", fcntl.LOCK_EX | fcntl.LOCK_NB
    folder.mkdir()
    (folder / ".txtrain-scratch").touch()
    theirs = os.open(folder, os.O_RDONLY)
    fcntl.flock(theirs, how)
    assert files.lock(folder) is None
    with files.scratch() as own:
        assert folder.exists()
        assert not (own / ".txtrain-scratch").exists()
    fcntl.flock(theirs, fcntl.LOCK_UN)
    held = files.lock(folder)
    assert held is not None
    with pytest.raises(BlockingIOError):
        fcntl.flock(theirs, how)
    held()
    fcntl.flock(theirs, how)
    os.close(theirs)


def test_a_temporary_folder_in_use_by_another_host_is_not_removed(tmp_path, monkeypatch, between_hosts):
    """$TMPDIR may be shared, too."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with files.scratch() as first, files.scratch() as second:
        assert first.exists()
        assert second.exists()
    (tmp_path / "txtrain-dead").mkdir()
    (tmp_path / "txtrain-dead" / files._MARK).touch()
    with files.scratch():
        assert not (tmp_path / "txtrain-dead").exists()


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


# ---------------------------------------------------------------------------------------------------------------- the disk


def test_a_run_folder_that_cannot_be_written_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    whys = {"file": "is a file", "file/x": "file is a file", "link": "is a link to .*nothing", "x" * 300: "name too long", "a/" + "x" * 300: "too long"}
    for where, why in whys.items():
        with pytest.raises(ConfigError, match=f"`run_dir` must be a folder.*{why}"):
            run_folder.choose(tiny(tmp_path, f"run_dir={tmp_path / where}"))
    before = sorted(tmp_path.iterdir())

    def full(*args, **kwargs):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"`run_dir` must be .* quota exceeded"):
        run_folder.choose(tiny(tmp_path, f"run_dir={tmp_path / 'new' / 'run'}"))
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_no_matter_of_writing_is_not_called_one(tmp_path):
    def attempt(error):
        with files.writing(tmp_path / "run", "run_dir"):
            raise error

    for error in (TimeoutError(), ConnectionError("reset"), PermissionError(13, "no", "/etc/shadow")):
        with pytest.raises(type(error)):
            attempt(error)
    for error in (OSError(28, "No space"), PermissionError(13, "no", str(tmp_path / "run" / "x")), OSError("9 requested and 0 written")):
        with pytest.raises(ConfigError, match="`run_dir`"):
            attempt(error)


def test_a_run_json_on_a_full_disk_still_says_how_the_run_ended(tmp_path, monkeypatch):
    config = tiny(tmp_path, f"run_dir={tmp_path / 'run'}")
    place = run_folder.choose(config)
    place.create(config, {"who": "first"})

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    size = (tmp_path / "run/run.json").stat().st_size
    monkeypatch.setattr(files, "write", full)
    place.end("failed")
    monkeypatch.undo()
    told = json.loads((tmp_path / "run/run.json").read_text())
    assert (told["status"], told["who"]) == ("failed", "first")
    assert (tmp_path / "run/run.json").stat().st_size <= size


def test_tmpdir_that_is_none_is_told_and_no_temporary_folder_at_all_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert files.check_temporary() is None
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nothing"))
    assert files.check_temporary().startswith(f"TMPDIR={tmp_path / 'nothing'} is no folder")
    assert files.check_temporary() is None  # once is enough
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nothing"))
    monkeypatch.setattr(tempfile, "_get_default_tempdir", lambda: (_ for _ in ()).throw(FileNotFoundError(2, "No usable temporary directory found")))
    with pytest.raises(ConfigError, match="`TMPDIR` must be a folder"):
        files.check_temporary()


KEEP = "import sys, time; from txtrain.ground import files\nwith files.scratch() as f: (f / 'x').touch(); print(f, flush=True); time.sleep(60)"


def test_a_temporary_folder_is_removed_also_after_kill_9_but_not_while_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    child = subprocess.Popen([sys.executable, "-c", KEEP], stdout=subprocess.PIPE, text=True, env=environment)
    theirs = Path(child.stdout.readline().strip())
    (tmp_path / "txtrain-file").touch()  # none of ours
    (tmp_path / "txtrain-link").symlink_to("/")
    (tmp_path / "txtrain-notes").mkdir()
    with files.scratch() as ours:
        assert {theirs, ours} < set(tmp_path.iterdir())
    assert theirs.exists()
    assert not ours.exists()
    child.kill()
    child.wait()
    with files.scratch():
        assert not theirs.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["txtrain-file", "txtrain-link", "txtrain-notes"]


@pytest.mark.parametrize("where", ["x" * 300, "a/" * 5000, "~nobody-of-that-name/x", "a\0b", "\ud800", "", None])
def test_what_cannot_be_a_path_is_refused_before_the_system_is_asked(where):
    with pytest.raises(ConfigError, match="`out` must be a path") as e:
        files.path_of(where, "out")
    assert len(str(e.value)) < 500


def test_space_is_asked_for_and_a_file_that_finds_none_is_refused_before_its_first_byte(tmp_path):
    with open(tmp_path / "file", "wb") as f:
        files.reserve(f.fileno(), 3000)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
            with pytest.raises(OSError, match="File too large"):
                files.reserve(f.fileno(), 5000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "file").stat().st_size in (0, 3000)  # 0: a file system that has no such call
    ends = os.pipe()
    files.reserve(ends[1], 3000)  # nor has a pipe
    for end in ends:
        os.close(end)


def test_links_that_lie_where_a_file_is_to_be_written_are_not_written_through(tmp_path):
    mine, folder = tmp_path / ".bashrc", tmp_path / "strangers"
    mine.write_text("mine")
    folder.mkdir()
    (folder / "out.json.tmp").symlink_to(mine)
    (folder / "out.json").symlink_to(mine)
    files.write(folder / "out.json", "text")
    assert (folder / "out.json").read_text() == "text"
    for name in ("model.safetensors.tmp", "generation_config.json", "tokenizer.json"):
        (folder / name).symlink_to(mine)
    txtrain.save_pretrained(seeded(small()), folder, byte_tokenizer())
    assert mine.read_text() == "mine"
    assert not any(path.is_symlink() for path in folder.iterdir())


@pytest.mark.parametrize("end", ["", ".id"])
def test_a_prepared_file_of_an_interrupted_command_is_refused(end, tmp_path):
    out = tmp_path / "strangers/out.jsonl"
    out.parent.mkdir()
    file = out.with_name(f"out.jsonl.part{end}")
    file.symlink_to(tmp_path / "new")
    with pytest.raises(ConfigError, match="must stay in its folder, but is a link"):
        PartFile(out, "id").begin(1)
    assert not (tmp_path / "new").exists()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ConfigError, match="must be a regular file"):
        PartFile(out, "id")
    file.unlink()
    out.with_name("out.jsonl.part").write_text("")
    out.with_name("out.jsonl.part.id").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is of another checkpoint"):
        PartFile(out, "id")

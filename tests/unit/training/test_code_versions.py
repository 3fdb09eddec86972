"""Code that was edited is told from code that was not, without a version number that somebody would have to change."""

import subprocess
import sys

import pytest

from txtrain.training import code_versions


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "below").mkdir()
    (tmp_path / "below/b.py").write_text("y = 2\n")
    return tmp_path


def of(folder):
    return code_versions.digest(sorted(folder.rglob("*.py")), folder)


def test_a_digest_changes_with_a_files_content_its_name_and_where_a_border_is(files):
    seen = [of(files)]
    (files / "a.py").write_text("x = 3\n")
    seen.append(of(files))
    (files / "a.py").rename(files / "c.py")
    seen.append(of(files))
    (files / "below/b.py").rename(files / "b.py")
    seen.append(of(files))
    (files / "b.py").write_text("")
    (files / "c.py").write_text("x = 3\ny = 2\n")
    seen.append(of(files))
    assert len(set(seen)) == 5


def test_what_a_run_imports_is_part_of_its_code(files, monkeypatch):
    monkeypatch.syspath_prepend(files)
    monkeypatch.delitem(sys.modules, "a", raising=False)
    __import__("a")
    try:
        before = code_versions.versions(["a", str(files / "a.py"), "not_imported"])
        (files / "a.py").write_text("x = 3\n")
        after = code_versions.versions(["a"])
    finally:
        del sys.modules["a"]
    assert before["the code of a"] == before[f"the code of {files / 'a.py'}"] != after["the code of a"]
    assert "the code of not_imported" not in before
    assert before["the code of txtrain"] == after["the code of txtrain"]
    assert before["the version of torch"]


def test_the_commit_of_a_strangers_repository_is_read_without_running_what_its_configuration_names(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(files.parent))
    assert code_versions.git_commit() is None

    def git(*words):
        me = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *me, *words], capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    (files / ".gitattributes").write_text("* filter=theirs diff=theirs\n")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    (files / "a.py").write_text("x = 4\n")
    for key in ("core.fsmonitor", "core.pager", "pager.rev-parse", "filter.theirs.clean", "diff.theirs.textconv"):
        git("config", key, f"echo {key} >> ran; false")
    assert (code_versions.git_commit(), (files / "ran").exists()) == (commit, False)

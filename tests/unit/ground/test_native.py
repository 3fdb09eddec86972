"""Where torch keeps what it compiles, and executes."""

import os
import tempfile

import pytest

from txtrain.errors import ConfigError
from txtrain.ground import native


@pytest.fixture
def default(tmp_path, monkeypatch):
    """torch's folder, in a temporary one that users share."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "kept")  # what is there before comes back behind the test
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOGNAME", "me")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / "torchinductor_me"


def chosen() -> str:
    native.use_own_compiler_cache()
    return os.environ.pop("TORCHINDUCTOR_CACHE_DIR")


def test_the_compilers_cache_is_torchs_where_it_is_ones_own(default, monkeypatch):
    assert [chosen(), chosen()] == [str(default)] * 2
    assert default.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/given")
    assert chosen() == "/given"


@pytest.mark.parametrize("made", ["writable", "link", "owner"])
def test_a_compilers_cache_that_another_user_made_is_not_used(made, default, tmp_path, monkeypatch):
    default.symlink_to(tmp_path) if made == "link" else default.mkdir()
    if made == "writable":
        default.chmod(0o777)
    if made == "owner":
        monkeypatch.setattr(native, "_is_own", lambda folder: folder != default)
    assert chosen() == str(tmp_path / "cache" / "txtrain" / "inductor")
    (tmp_path / "cache" / "txtrain" / "inductor").chmod(0o777)
    if made != "owner":
        with pytest.raises(ConfigError, match="`TORCHINDUCTOR_CACHE_DIR` must be a folder that you alone may write to"):
            native.use_own_compiler_cache()

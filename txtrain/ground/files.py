"""Files that are complete or absent, whenever the process dies; a folder that one process at a time writes to."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from txtrain.errors import ConfigError

PATIENCE = 6.0  # seconds: the data loader's workers of a process that was killed hold its lock until they notice (5 s)


def path_of(where: object, name: str) -> Path:
    """The path that an argument of that name is, with the home folder in place of `~`.

    Raises:
        ConfigError: it is no path.
    """
    text = os.fspath(where) if isinstance(where, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(f"`{name}` must be a path, but is {where!r} instead.")
    try:
        return Path(text).expanduser()
    except RuntimeError as e:  # ~name of nobody
        raise ConfigError(f"`{name}` must be a path, but is {text!r} instead: {e}") from e


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, text: str) -> None:
    """Write a whole file at once: a reader sees the old one or the new one, also after a power cut."""
    part = path.with_name(path.name + ".tmp")
    with open(part, "w", encoding="utf-8", newline="") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
    sync(path.parent)


def lock(folder: Path) -> Callable[[], object] | None:
    """Lock a folder; None if another process holds it.

    The lock is on the folder itself and leaves no file. The system gives it back when the process ends, be it by kill -9.

    Returns:
        A function that gives it back; so does the garbage collector where that is forgotten.
    """
    handle = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + PATIENCE
    while True:
        ours = _flock(handle)
        if ours:
            return _Release(handle)
        if ours is None or time.monotonic() > deadline:
            os.close(handle)
            return None if ours is False else lambda: None
        time.sleep(0.2)


def _flock(handle: int) -> bool | None:
    """Whether the lock of an open folder is this process' now; None on a file system, or a system, without locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        return None
    except OSError as e:
        return False if e.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


@contextlib.contextmanager
def scratch(prefix: str = "txtrain-") -> Iterator[Path]:
    """A temporary folder, locked as long as it is used; those that a process left which was killed (kill -9) are removed.

    Without locks nothing is known of the others, and they stay.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError), _opened(left) as handle:  # another user's, or a plain file
            if _flock(handle):
                shutil.rmtree(left, ignore_errors=True)
    while True:
        with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as name, _opened(Path(name)) as handle:
            if _flock(handle) is not False and os.path.exists(name):  # else another start took it for one that was left
                yield Path(name)
                return


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield handle
    finally:
        os.close(handle)


class _Release:
    def __init__(self, handle: int) -> None:
        self._close = weakref.finalize(self, os.close, handle)

    def __call__(self) -> None:
        self._close()

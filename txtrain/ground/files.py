"""Atomic writes (a file is complete or absent, whenever the process dies), locked folders, errors of the disk."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from txtrain.errors import ConfigError, shorten

LOCK = "lock"  # file in a temporary folder
OWNER_LOCK = ".lock"  # file in a folder that one process at a time writes to; it stays
_MARK = ".txtrain-scratch.lock"  # not as once, when the folder itself was locked: such a one may be in use
PATIENCE = 6.0  # seconds; data loader workers of a killed process hold its lock until they notice (5 s)


def path_of(where: object, name: str, what: str = "a path") -> Path:
    """The argument `name` as a path, with `~` expanded. what: it must be.

    Raises:
        ConfigError: it is not a path.
    """
    text = os.fspath(where) if isinstance(where, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(f"`{name}` must be {what}, but is {shorten(repr(where))} instead.")
    try:
        path = Path(text).expanduser()
        path.lstat()
    except (RuntimeError, ValueError, OSError) as e:  # ~NAME of no user; half a character; a text, for example
        if isinstance(e, OSError) and e.errno != errno.ENAMETOOLONG:
            return path
        why = e.strerror if isinstance(e, OSError) else shorten(e).rstrip(".")
        raise ConfigError(f"`{name}` must be {what}, but is {shorten(repr(text))} instead: {why}.") from e
    return path


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, text: str | bytes) -> None:
    """Write a file atomically: a reader sees the old or the new text, also after a power failure."""
    part = path.with_name(path.name + ".tmp")
    try:
        with new(part) as f:
            f.write(text.encode() if isinstance(text, str) else text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def new(path: Path) -> BinaryIO:
    """An empty file in place of what has its name: a link that a stranger's folder holds is not written through."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def reserve(handle: int, size: int) -> None:
    """Ask the file system for the space of an open file: a full disk is met before the first byte, and writing takes a
    quarter less of the CPU's time on ext4. Does nothing where the system or the file system has no such call.

    Raises:
        OSError: there is no such space.
    """
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate  # os.posix_fallocate writes each block where it must
    except (AttributeError, TypeError):  # macOS; Windows
        return
    if size and fallocate(handle, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        met = ctypes.get_errno()
        if met in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(met, os.strerror(met))


def overwrite(path: Path, text: str) -> None:
    """Write in place: on a full disk a text that is no longer than the old one still fits."""
    with open(path, "r+b") as f:
        f.write(text.encode())
        f.truncate()
        f.flush()
        os.fsync(f.fileno())


def lock(folder: Path) -> Callable[[], object] | None:
    """Lock a folder.

    The lock is on a file in it, which stays: of folders themselves NFS and Lustre have no locks between hosts. It is on
    the folder too, as that of earlier versions, whose processes may still run. The system releases it when the process
    ends, even by kill -9.

    Returns:
        A function that releases it, as does garbage collection; None if another process holds the lock.

    Raises:
        ConfigError: the file is none.
    """
    handles = _open_lock(folder / OWNER_LOCK), os.open(folder, os.O_RDONLY)
    release, deadline = _Release(handles), time.monotonic() + PATIENCE
    while True:
        if all(_flock(handle) is not False for handle in handles):
            return release
        if time.monotonic() > deadline:
            return None
        time.sleep(0.2)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Lock a folder for a while; whether this process has the lock.

    A folder that is to be removed is so afterwards: on NFS it is not empty while a file of it is open.
    """
    release = lock(folder)
    try:
        yield release is not None
    finally:
        if release is not None:
            release()


def _open_lock(file: Path) -> int:
    """Open a file to lock it, for writing: NFS has no exclusive lock on another. Makes it where it is not there.

    Raises:
        ConfigError: it is a link or a folder.
    """
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.EISDIR):
            what = "a folder" if e.errno == errno.EISDIR else "a link"
            raise ConfigError(f"{file} must be an empty file, on which its folder is locked, but is {what}.") from e
        if not isinstance(e, PermissionError):
            raise
        if not file.exists():
            raise
        return os.open(file, os.O_RDONLY | os.O_NOFOLLOW)  # another user's, from whose host alone it is refused


def _flock(handle: int) -> bool | None:
    """Try to lock an open file: whether this process has the lock; None if the system or file system has no locks."""
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
    """A temporary folder, locked while it is used. Removes those of killed processes, if the file system has locks.

    A file marks the folders that were made here: others with such a name are left alone.
    """
    for mark in Path(tempfile.gettempdir()).glob(f"{prefix}*/{_MARK}"):
        with contextlib.suppress(OSError), _opened(mark) as handle:  # another user's, or a link
            if not mark.parent.is_symlink() and _flock(handle):
                shutil.rmtree(mark.parent, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as name,
        _opened(Path(name, LOCK), os.O_CREAT) as handle,
    ):
        _flock(handle)  # before the mark, without which nobody else takes the folder for abandoned
        Path(name, LOCK).rename(Path(name, _MARK))
        yield Path(name)


@contextlib.contextmanager
def _opened(file: Path, how: int = 0) -> Iterator[int]:
    handle = os.open(file, os.O_RDWR | os.O_NOFOLLOW | how, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


class _Release:
    def __init__(self, handles: tuple[int, ...]) -> None:
        self._close = weakref.finalize(self, _close, handles)

    def __call__(self) -> None:
        self._close()


def _close(handles: tuple[int, ...]) -> None:
    for handle in handles:
        os.close(handle)


# --------------------------------------------------------------------------------------------------- temporary folders


@contextlib.contextmanager
def temporary(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent`, `.NAME.xxxxxxxx.tmp`, removed at the end unless it was renamed.

    Removes abandoned ones first: those whose lock is free, since the system, on any host, releases it when the process
    ends. Process ids would not do, which other containers and hosts do not share.
    """
    remove_abandoned(parent)
    made, handle = _locked_folder(parent, name)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(handle)


def _locked_folder(parent: Path, name: str) -> tuple[Path, int]:
    while True:
        made = parent / f".{name}.{secrets.token_hex(4)}.tmp"
        made.mkdir()  # not by tempfile, whose folders only the owner may read
        with contextlib.suppress(FileNotFoundError):  # another process may take it for abandoned before it is locked
            handle = _open_lock(made / LOCK)
            if _flock(handle) is not False and os.path.samestat(os.fstat(handle), os.stat(made / LOCK)):
                return made, handle
            os.close(handle)


def remove_abandoned(parent: Path) -> None:
    """Remove temporary folders in `parent` of ended processes: this user's, and if the file system has locks."""
    for path in parent.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if not (path / LOCK).exists():
                path.rmdir()  # fails unless it is empty
                continue
            handle = os.open(path / LOCK, os.O_RDWR)
            try:
                if _flock(handle):
                    shutil.rmtree(path)
            finally:
                os.close(handle)


# ------------------------------------------------------------------------------------------------------------- writing


def check_writable(folder: Path, key: str) -> None:
    """Refuse a folder, existing or new, that cannot be written to, before any work is done. Leaves nothing there.

    key: the key or variable that names the folder.

    Raises:
        ConfigError: names the folder and the cause: its name, a dangling link, permissions, a full disk.
    """
    try:
        there = _nearest(folder.absolute())
        for part in folder.absolute().relative_to(there).parts:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.lstat(there / part)  # the name may be too long
        if there.is_symlink() and not there.exists():
            raise FileNotFoundError(errno.ENOENT, f"{there} is a link to {os.readlink(there)}, which does not exist")
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file")
        with tempfile.TemporaryFile(dir=there, buffering=0) as f:
            f.write(bytes(1 << 16))
            os.fsync(f.fileno())
    except OSError as e:
        raise _unwritable(folder, key, e) from e


def _nearest(path: Path) -> Path:
    """The path, or its nearest parent, that exists, even as a dangling link."""
    while True:
        try:
            os.lstat(path)
            return path
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent


def check_temporary() -> str | None:
    """A warning if $TMPDIR is not writable, which tempfile ignores silently.

    Raises:
        ConfigError: there is no folder for temporary files.
    """
    given = os.environ.get("TMPDIR")
    try:
        used = tempfile.gettempdir()
    except FileNotFoundError as e:
        raise ConfigError(f"`TMPDIR` must be a folder to write to, but is {given!r} instead: {e.strerror}.") from e
    if not given or os.path.abspath(given) == used:
        return None
    os.environ["TMPDIR"] = used  # for child processes, which then do not warn again
    return f"TMPDIR={given} is no folder that can be written to: {used} is used instead."


@contextlib.contextmanager
def writing(folder: Path, key: str) -> Iterator[None]:
    """Turn errors of writing to a folder, or beside it, into ConfigError: a full disk, a quota, missing permissions.

    Raises:
        ConfigError: names the key, the folder and the cause.
    """
    try:
        yield
    except OSError as e:
        ours = isinstance(e.filename, (str, os.PathLike)) and Path(e.filename).is_relative_to(folder.parent)
        of_numpy = type(e) is OSError and e.errno is None  # an incomplete write
        if not (ours or of_numpy or e.errno in _FULL):
            raise
        raise _unwritable(folder, key, e) from e


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def _unwritable(folder: Path, key: str, e: OSError) -> ConfigError:
    what = "a folder, or a new one in a folder, that can be written to"
    return ConfigError(f"`{key}` must be {what}, but is {str(folder)!r} instead: {e.strerror or e}.")

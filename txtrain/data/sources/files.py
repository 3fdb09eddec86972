"""Files of text by path, glob or folder, packed or not, and what can be wrong with them."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from txtrain.errors import ConfigError, hint

_HASHED_BELOW = 1 << 30  # bytes of all files together; above, sizes and times stand for the contents
PACKED = {".gz": "gzip", ".zst": "Zstandard"}


def find_files(spec: str | Sequence[str], key: str, kinds: Sequence[str] = (".txt",), what: str = "text") -> list[Path]:
    """The files that `spec` (the value of the config key `key`) names: files, globs, folders, in a fixed order.

    Args:
        kinds: the ends of names that count in a folder, each also with an end of PACKED behind it.
        what: the files hold.

    Raises:
        ConfigError: a path that does not exist, a folder without such files, an empty file.
    """
    found: dict[Path, None] = {}  # an ordered set: a file named twice counts once
    for name in [spec] if isinstance(spec, str) else spec:
        found.update(dict.fromkeys(_expand(name, key, tuple(kinds), what)))
    if not found:
        raise ConfigError(f"`{key}` must name at least one file, but is {list(spec)!r} instead.")
    return list(found)


def _expand(name: str, key: str, kinds: tuple[str, ...], what: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        if not path.stat().st_size:
            raise ConfigError(f"`{key}`: {name} must hold {what}, but the file is empty.")
        return [path.resolve()]
    if path.is_dir():
        files = _filled(p for p in path.rglob("*") if unpacked_name(p).endswith(kinds))
        if not files:
            listed = ", ".join(kinds[:-1]) + (" or " if kinds[:-1] else "") + kinds[-1]
            raise ConfigError(f"`{key}`: the folder {name} must hold {listed} files with {what}, but holds none. Other names: a glob such as '{name}/*.md'.")
        return files
    if glob.has_magic(name):
        files = _filled(map(Path, glob.glob(str(path), recursive=True)))
        if not files:
            raise ConfigError(f"`{key}` must match files with {what}, but {name!r} matches none.")
        return files
    raise ConfigError(missing(name, key))


def _filled(paths: Iterable[Path]) -> list[Path]:
    return sorted(p.resolve() for p in paths if p.is_file() and p.stat().st_size)


def unpacked_name(path: Path) -> str:
    """The file's name without an end that says how it is packed."""
    return path.stem if path.suffix in PACKED else path.name


def missing(name: str, key: str, what: str = "an existing file, glob or folder") -> str:
    """The sentence for a path that does not exist: how far it does, and the nearest name there."""
    path = Path(name).expanduser()
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    near = hint(path.name, os.listdir(parent), str(parent / "{}") if str(parent) != "." else "{}")
    return f"`{key}` must be {what}, but {name} does not exist.{near or f' There is no {path.name} in {parent.resolve()}.'}"


def read_text(path: Path, key: str) -> str:
    """A UTF-8 file as one string, line ends as \\n; unpacked if its name ends in .gz or .zst.

    Raises:
        ConfigError: it is not UTF-8, or holds NUL bytes, as binary files do; says where.
    """
    return as_text(read_bytes(path, key), path, key).replace("\r\n", "\n")


def as_text(raw: bytes, path: Path, key: str, at: int = 0) -> str:
    """The text of some bytes of a file, which stand at offset `at` of what is packed in it."""
    try:
        text = raw.decode("utf-8-sig" if at == 0 else "utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(f"`{key}` must be text in UTF-8, but {path} is not: byte 0x{raw[e.start]:02x} at offset {at + e.start}.") from None
    if "\0" in text:
        raise ConfigError(f"`{key}` must be text, but {path} is a binary file: byte 0x00 at offset {at + raw.index(0)}.")
    return text


def read_bytes(path: Path, key: str) -> bytes:
    """A file's bytes; unpacked if its name ends in .gz or .zst.

    Raises:
        ConfigError: it is not packed so, or cut off.
    """
    with open_unpacked(path, key) as f:
        return f.read()


@contextmanager
def open_unpacked(path: Path, key: str) -> Iterator[IO[bytes]]:
    """A file as a stream of its bytes, unpacked as they are read.

    Raises:
        ConfigError: inside too, where what is read is not packed as its name says, or cut off.
    """
    if path.suffix not in PACKED:
        with path.open("rb") as f:
            yield f
        return
    try:
        with _unpacked(path) as f:
            yield f
    except (gzip.BadGzipFile, EOFError, zlib.error, _ZstandardError) as e:
        raise ConfigError(f"`{key}` must be a whole {PACKED[path.suffix]} file, but {path} is not: {e}.") from None


class _ZstandardError(Exception):
    """Arrow says it by a plain OSError, which a broken disk does too."""


def _unpacked(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    import pyarrow as pa  # comes with datasets; the standard library has Zstandard from Python 3.14 on

    return io.BufferedReader(_Zstandard(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")), 1 << 20)


class _Zstandard(io.RawIOBase):
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            read = self._stream.read(len(buffer))
        except OSError as e:
            raise _ZstandardError(e) from e
        buffer[: len(read)] = read
        return len(read)


def files_identity(files: Iterable[Path]) -> str:
    """A hash of the contents, in order; of paths, sizes and times where reading them would take long."""
    files = list(files)
    sha = hashlib.sha256()
    by_contents = sum(p.stat().st_size for p in files) < _HASHED_BELOW
    for path in files:
        stat = path.stat()
        if by_contents:
            with path.open("rb") as f:
                sha.update(f"{stat.st_size} ".encode() + hashlib.file_digest(f, "sha256").digest())
        else:
            sha.update(f"{path} {stat.st_size} {stat.st_mtime_ns} ".encode())
    return sha.hexdigest()

"""Text files by path, glob or folder, and what can be wrong with them."""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from txtrain.errors import ConfigError, hint

_HASHED_BELOW = 1 << 30  # bytes of all files together; above, sizes and times stand for the contents


def find_files(spec: str | Sequence[str], key: str) -> list[Path]:
    """The files that `spec` (the value of the config key `key`) names: files, globs, folders with their .txt, in a fixed order.

    Raises:
        ConfigError: a path that does not exist, a folder without .txt, an empty file.
    """
    found: dict[Path, None] = {}  # an ordered set: a file named twice counts once
    for name in [spec] if isinstance(spec, str) else spec:
        found.update(dict.fromkeys(_expand(name, key)))
    if not found:
        raise ConfigError(f"`{key}` must name at least one file, but is {list(spec)!r} instead.")
    return list(found)


def _expand(name: str, key: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        if not path.stat().st_size:
            raise ConfigError(f"`{key}`: {name} must hold text, but the file is empty.")
        return [path.resolve()]
    if path.is_dir():
        files = sorted(p.resolve() for p in path.rglob("*.txt") if p.is_file() and p.stat().st_size)
        if not files:
            raise ConfigError(f"`{key}`: the folder {name} must hold .txt files with text, but holds none. Other names: a glob such as '{name}/*.md'.")
        return files
    if glob.has_magic(name):
        files = sorted(p.resolve() for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file() and p.stat().st_size)
        if not files:
            raise ConfigError(f"`{key}` must match files with text, but {name!r} matches none.")
        return files
    raise ConfigError(missing(name, key))


def missing(name: str, key: str, what: str = "an existing file, glob or folder") -> str:
    """The sentence for a path that does not exist: how far it does, and the nearest name there."""
    path = Path(name).expanduser()
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    near = hint(path.name, os.listdir(parent), str(parent / "{}") if str(parent) != "." else "{}")
    return f"`{key}` must be {what}, but {name} does not exist.{near or f' There is no {path.name} in {parent.resolve()}.'}"


def read_text(path: Path, key: str) -> str:
    """A UTF-8 file as one string, line ends as \\n; unpacked if its name ends in .gz.

    Raises:
        ConfigError: it is not UTF-8, or holds NUL bytes, as binary files do; says where.
    """
    raw = read_bytes(path, key)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ConfigError(f"`{key}` must be text in UTF-8, but {path} is not: byte 0x{raw[e.start]:02x} at offset {e.start}.") from None
    if "\0" in text:
        raise ConfigError(f"`{key}` must be text, but {path} is a binary file: byte 0x00 at offset {raw.index(0)}.")
    return text.replace("\r\n", "\n")


def read_bytes(path: Path, key: str) -> bytes:
    """A file's bytes; unpacked if its name ends in .gz.

    Raises:
        ConfigError: it is no gzip file, or cut off.
    """
    raw = path.read_bytes()
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise ConfigError(f"`{key}` must be a whole gzip file, but {path} is not: {e}.") from None


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

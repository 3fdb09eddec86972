"""Text files by path, glob or folder, compressed or not, and their errors."""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import io
import json
import logging
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from txtrain.errors import ConfigError, hint
from txtrain.ground.files import path_of
from txtrain.ground.plain_files import check_expansion

log = logging.getLogger(__name__)
_CHUNK = 1 << 20
_LONG = 1 << 20  # characters; a longer text stays in its file
HASHED_BELOW = 1 << 30  # bytes of all files together; above, sizes and times replace hashes of the contents
_LIST = re.compile(r"\[((?:[^][]|\[[^][]*\])*)\]")
_COMMA = re.compile(r",(?![^[]*\])")
_QUOTED = re.compile(r"^(['\"])(.*)\1$")
PACKED = {".gz": "gzip", ".zst": "Zstandard"}


def find_files(spec: str | Sequence[str], key: str, kinds: Sequence[str] = (".txt",), what: str = "text") -> list[Path]:
    """The files of `spec`, the value of config key `key`: files, globs, folders, in a fixed order.

    Args:
        kinds: suffixes of the files to take from a folder, also with a suffix of PACKED after them.
        what: the contents of the files, for errors.

    Raises:
        ConfigError: a path does not exist, a folder has no such file, or a file is empty.
    """
    found: dict[Path, None] = {}  # an ordered set
    for name in listed(spec):
        found.update(dict.fromkeys(_expand(name, key, tuple(kinds), what)))
    if not found:
        raise ConfigError(f"`{key}` must name at least one file, but is {spec!r} instead.")
    return list(found)


def listed(spec: str | Sequence[str]) -> list[str]:
    """The paths in `spec`. A string is one path if it exists, or matches files as a glob; else it may be several:
    `a.txt,b.txt` or `[a.txt,b.txt]`. A comma within a glob's brackets does not separate paths."""
    if not isinstance(spec, str):
        return list(spec)
    inner, pattern = _LIST.fullmatch(spec), os.path.expanduser(spec)
    if os.path.exists(pattern) or not (inner or "," in spec):
        return [spec]
    parts = [part.strip() for part in _COMMA.split(inner[1] if inner else spec)]
    parts = [_QUOTED.sub(r"\2", part) for part in parts if part]
    as_list = inner and (len(parts) > 1 or any(map(os.path.exists, parts)))  # not a character set of a glob
    if not as_list and glob.has_magic(spec) and any(glob.iglob(pattern, recursive=True)):
        return [spec]
    return parts or [spec]


def _expand(name: str, key: str, kinds: tuple[str, ...], what: str) -> list[Path]:
    path = path_of(name, key)
    if path.is_file():
        if not path.stat().st_size:
            raise ConfigError(f"`{key}`: {name} must hold {what}, but the file is empty.")
        return [path.resolve()]
    if path.is_dir():
        files = _filled(p for p in path.rglob("*") if unpacked_name(p).endswith(kinds))
        if not files:
            listed = ", ".join(kinds[:-1]) + (" or " if kinds[:-1] else "") + kinds[-1]
            raise ConfigError(
                f"`{key}`: the folder {name} must hold {listed} files with {what}, but holds none. "
                f"Other names: a glob such as '{name}/*.md'."
            )
        return files
    if glob.has_magic(name):
        files = _filled(map(Path, glob.glob(str(path), recursive=True)))
        if not files:
            raise ConfigError(f"`{key}` must match files with {what}, but {name!r} matches none.")
        return files
    raise ConfigError(missing(name, key))


def kind_of(path: Path) -> str:
    """What an existing path is that is neither a file nor a folder."""
    if not path.exists():
        return f"a link to {os.readlink(path)}, which does not exist"
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(path.stat().st_mode), "no file")


def _filled(paths: Iterable[Path]) -> list[Path]:
    return sorted(p.resolve() for p in paths if p.is_file() and p.stat().st_size)


def unpacked_name(path: Path) -> str:
    """The file's name without a suffix of PACKED."""
    return path.stem if path.suffix in PACKED else path.name


def missing(name: str, key: str, what: str = "an existing file, glob or folder") -> str:
    """The error for a path that is no file and no folder: what it is, or how far it exists and the nearest name."""
    path = path_of(name, key)
    if os.path.lexists(path):
        return f"`{key}` must be {what}, but {name} is {kind_of(path)}."
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    near = hint(path.name, os.listdir(parent), str(parent / "{}") if str(parent) != "." else "{}")
    return (
        f"`{key}` must be {what}, but {name} does not exist."
        f"{near or f' There is no {path.name} in {parent.resolve()}.'}"
    )


class Skipped(dict[str, str]):
    """Place of each skipped row, and why. A stream meets its rows while the run goes on: from `list_in` on each is
    added to a file, once however often it is met; a copy in another process does so too.
    """

    file: Path | None = None

    def list_in(self, file: Path, lines: Iterable[str]) -> None:
        """lines: those of the file."""
        self.file, self.listed = file, set(lines)

    def __setitem__(self, where: str, why: str) -> None:
        super().__setitem__(where, why)
        line = json.dumps({"row": where, "why": why}, ensure_ascii=False) + "\n"
        if self.file is None or line in self.listed:
            return
        if not self.listed:
            log.warning("a bad row is left out (data.bad_rows=skip); %s lists it, and each one after it", self.file)
        self.listed.add(line)
        with self.file.open("a", encoding="utf-8") as f:
            f.write(line)


class Limits(NamedTuple):
    """Limits on untrusted files, and the handling of bad rows: the data keys of the same names."""

    max_expansion: float = 200.0  # ratio of unpacked to compressed size; of text it is 3 to 10
    max_text_bytes: int = 1 << 31  # of one text; the limit of Arrow's columns too
    encoding_errors: str = "strict"  # or replace
    skipped: dict[str, str] | None = None  # place of each skipped row, and why; None: bad rows are errors

    @property
    def identity(self) -> str:
        """The settings that change the texts, for fingerprints."""
        said = ["skip"] * (self.skipped is not None) + ["replace"] * (self.encoding_errors != "strict")
        return "".join(f"{word} " for word in said)

    @contextmanager
    def row(self, where: str) -> Iterator[None]:
        """Surrounds the reading of a row: skips and records a bad one if `skipped` is given."""
        try:
            yield
        except ConfigError as e:
            if self.skipped is None:
                raise
            self.skipped[where] = str(e)

    def check_text(self, n_bytes: int, where: str, key: str) -> None:
        """Raises ConfigError if a text is longer than max_text_bytes."""
        if n_bytes > self.max_text_bytes:
            raise ConfigError(
                f"`{key}` must have texts of at most {self.max_text_bytes:,} bytes (data.max_text_bytes), "
                f"but that of {where} is longer."
            )


class LongText:
    """A text that stays in its file and is read chunk by chunk at each pass; with the methods of str that we need.

    Args:
        chunks: returns a new iterator over all of it at each call.
    """

    def __init__(self, chunks: Callable[[], Iterator[str]]) -> None:
        self.chunks = chunks

    @cached_property
    def _n(self) -> int:
        return sum(map(len, self.chunks()))

    def __len__(self) -> int:
        return self._n

    def __bool__(self) -> bool:
        return True

    def isspace(self) -> bool:
        return all(map(str.isspace, self.chunks()))

    def find(self, char: str, start: int) -> int:
        at = 0
        for chunk in self.chunks():
            if (found := chunk.find(char, max(start - at, 0))) >= 0:
                return at + found
            at += len(chunk)
        return -1

    def __getitem__(self, part: slice) -> LongText:
        return LongText(partial(_within, self.chunks, part.start or 0, part.stop))


Text = str | LongText


def _within(chunks: Callable[[], Iterator[str]], begin: int, end: int | None) -> Iterator[str]:
    at = 0
    for chunk in chunks():
        if found := chunk[max(begin - at, 0) : None if end is None else max(end - at, 0)]:
            yield found
        at += len(chunk)
        if end is not None and at >= end:
            return


def chunks_of(text: Text) -> Iterator[str]:
    return iter((text,) if text else ()) if isinstance(text, str) else text.chunks()


def lines_of(text: Text) -> Iterator[str]:
    """As `str.splitlines(keepends=True)`."""
    waiting: list[str] = []  # parts of a line
    for chunk in chunks_of(text):
        if waiting and len(f"{waiting[-1][-1]}x".splitlines()) > 1:  # the line has ended
            yield "".join(waiting)
            waiting = []
        first, *lines = chunk.splitlines(keepends=True)
        waiting.append(first)
        if lines:
            yield "".join(waiting)
            yield from lines[:-1]
            waiting = lines[-1:]
    yield from ["".join(waiting)] if waiting else ()


def text_of(path: Path, key: str, limits: Limits) -> Text:
    """A UTF-8 file as one text, which stays in the file if it is long; see `text_chunks`."""
    read = partial(text_chunks, path, key, limits)
    held, n = [], 0
    for chunk in read():
        held.append(chunk)
        n += len(chunk)
        if n > _LONG:
            return LongText(read)
    return "".join(held)


def text_chunks(path: Path, key: str, limits: Limits) -> Iterator[str]:
    r"""The non-empty chunks of a UTF-8 file, with line ends as \n; unpacked if its name ends in .gz or .zst.

    Raises:
        ConfigError: it is not UTF-8, holds NUL bytes as binary files do, or exceeds the limits.
    """
    decoder, n, held = codecs.getincrementaldecoder("utf-8")(limits.encoding_errors), 0, ""
    with open_unpacked(path, key, limits) as f:
        raw = b"-"
        while raw:
            raw = f.read(_CHUNK)
            begin = n - len(decoder.getstate()[0])
            n += len(raw)
            limits.check_text(n, str(path), key)
            with undecoded(str(path), key, begin):
                text = decoder.decode(raw, final=not raw)
            check_binary(text, str(path), key, begin)
            if n and begin == 0:
                text = text.removeprefix("\ufeff")
            text = held + text
            held = "\r" if raw and text.endswith("\r") else ""  # \n may follow
            if text := text.removesuffix(held).replace("\r\n", "\n"):
                yield text


def as_text(raw: bytes, where: str, key: str, at: int = 0, errors: str = "strict") -> str:
    """The text of bytes at offset `at` of the unpacked file.

    Raises:
        ConfigError: it is not UTF-8, or holds NUL bytes.
    """
    with undecoded(where, key, at):
        text = raw.decode("utf-8", errors)
    check_binary(text, where, key, at)
    return text.removeprefix("\ufeff") if at == 0 else text


@contextmanager
def undecoded(where: str, key: str, at: int) -> Iterator[None]:
    """Python's errors about bytes that are not UTF-8, as ours."""
    try:
        yield
    except UnicodeDecodeError as e:
        remedy = "data.encoding_errors=replace puts \ufffd there"
        raise ConfigError(
            f"`{key}` must be text in UTF-8, but {where} is not: "
            f"byte 0x{e.object[e.start]:02x} at offset {at + e.start}. {remedy}."
        ) from None


def check_binary(text: str, where: str, key: str, at: int) -> None:
    if (found := text.find("\0")) >= 0:
        at += len(text[:found].encode())
        raise ConfigError(f"`{key}` must be text, but {where} is a binary file: byte 0x00 at offset {at}.")


@contextmanager
def open_unpacked(path: Path, key: str, limits: Limits) -> Iterator[IO[bytes]]:
    """The bytes of a file as a stream, unpacked while they are read.

    Raises:
        ConfigError: (inside the `with` too) the file is not compressed as its name says, is truncated, or unpacks to
            too much.
    """
    if path.suffix not in PACKED:
        with path.open("rb") as f:
            yield f
        return
    try:
        with _unpacked(path) as f, io.BufferedReader(_Measured(f, path, key, limits), 1 << 17) as measured:
            yield measured
    except (gzip.BadGzipFile, EOFError, zlib.error, _ZstandardError) as e:
        raise ConfigError(f"`{key}` must be a whole {PACKED[path.suffix]} file, but {path} is not: {e}.") from None


class _ZstandardError(Exception):
    """Arrow raises a plain OSError, as a broken disk does."""


def _unpacked(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    import pyarrow as pa  # installed with datasets; the standard library has Zstandard from Python 3.14 on

    return _Zstandard(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


class _Measured(io.RawIOBase):
    """An unpacked stream that refuses to exceed max_expansion."""

    def __init__(self, stream: Any, path: Path, key: str, limits: Limits) -> None:
        self._stream, self._where, self._packed = stream, f"`{key}`: {path}", path.stat().st_size
        self._most, self._unpacked = limits.max_expansion, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n: int = self._stream.readinto(buffer)
        self._unpacked += n
        check_expansion(self._unpacked, self._packed, self._most, self._where)
        return n


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
    """A hash of the contents, in order; of paths, sizes and times from HASHED_BELOW bytes on."""
    files = list(files)
    sha = hashlib.sha256()
    by_contents = sum(p.stat().st_size for p in files) < HASHED_BELOW
    for path in files:
        stat = path.stat()
        if by_contents:
            with path.open("rb") as f:
                sha.update(f"{stat.st_size} ".encode() + hashlib.file_digest(f, "sha256").digest())
        else:
            sha.update(f"{path} {stat.st_size} {stat.st_mtime_ns} ".encode())
    return sha.hexdigest()

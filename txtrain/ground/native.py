"""A C++ file as a library for this machine's processor: compiled once, and kept in the user's own cache.

Also where torch keeps what it compiles.

Not by torch's extension loader: it waits without end for the lock of a build that was killed, and wants ninja and
setuptools. Nor in a cache that users share, since what lies there is executed.
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import hashlib
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from txtrain.errors import ConfigError

_COMPILE = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")  # linked without: OpenMP is the one of torch
_SECONDS = 60


class Unavailable(Exception):
    """There is no library, and why; what it computes has another way."""


def library(source: Path) -> ctypes.CDLL:
    """Its functions, which are `extern "C"`.

    Raises:
        Unavailable: the processor or system is not one it was tried on, there is no compiler or no place for it.
    """
    processor = _processor()
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    try:
        code = source.read_bytes()
        name = hashlib.sha256(repr((code, _COMPILE, processor)).encode()).hexdigest()[:16]
        kept = _own_folder() / f"{source.stem}-{name}.so"
        if not kept.exists():
            if compiler is None:
                raise Unavailable("there is no C++ compiler")
            _compile(compiler, source, kept)
        return ctypes.CDLL(str(kept))
    except subprocess.CalledProcessError as e:
        said = e.stderr.strip().splitlines() or ["nothing was said"]
        raise Unavailable(f"{compiler} failed: {said[-1]}") from e
    except subprocess.TimeoutExpired as e:
        raise Unavailable(f"{compiler} took more than {_SECONDS} s") from e
    except (OSError, RuntimeError) as e:  # RuntimeError: no home folder
        raise Unavailable(str(e)) from e


def _processor() -> str:
    """What `-march=native` depends on: machines that share a home folder may differ in it."""
    flags = ""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith("flags")), "")
    if "avx2" not in flags.split():
        raise Unavailable("it is written for Linux on x86-64 processors with AVX2")
    return flags


def _own_folder(name: str = "native") -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "txtrain" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_own(folder):
        raise Unavailable(f"others may write to {folder}")
    return folder


def _is_own(folder: Path) -> bool:
    found = folder.stat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def use_own_compiler_cache() -> None:
    """To be called before `torch.compile`, which executes what lies in its cache: a folder in the temporary one, whose
    name every user of the machine knows, and may have made first. It is used if it is this user's.

    Raises:
        ConfigError: nor is the folder in the user's cache.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return
    try:
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, ImportError, OSError):  # of no name, as in a container; OSError: from Python 3.13 on
        user = f"uid_{os.getuid()}"
    folder = Path(tempfile.gettempdir()) / f"torchinductor_{user}"  # as torch
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        if folder.is_symlink() or not _is_own(folder):
            folder = _own_folder("inductor")
    except (OSError, RuntimeError, Unavailable) as e:  # RuntimeError: no home folder
        raise ConfigError(
            f"`TORCHINDUCTOR_CACHE_DIR` must be a folder that you alone may write to, since torch executes what lies "
            f"there; others may have written to {folder}, and ~/.cache is none: {e}."
        ) from e
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def _compile(compiler: str, source: Path, made: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="txtrain-native-") as folder:
        part, whole = f"{folder}/part.o", f"{folder}/whole.so"
        for command in ([compiler, *_COMPILE, "-c", str(source), "-o", part], [compiler, "-shared", part, "-o", whole]):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        beside = made.with_suffix(f".{secrets.token_hex(4)}.tmp")  # containers of one home may share a process id
        shutil.copyfile(whole, beside)
        beside.replace(made)

"""The code that the ranks of a run execute, to check that it is the same: txtrain, the user's files, libraries."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from txtrain.config.user_code import module_name

PACKAGE = Path(__file__).resolve().parents[1]
BELOW = ("torch", "lightning", "deepspeed")  # libraries that compute a step


def versions(imports: Sequence[str] = ()) -> dict[str, str]:
    """Version by name; for code that is edited more often than its version number, a digest of its files.

    imports: the configuration's `imports`, which have been imported.
    """
    found = {f"the version of {name}": _version(name) for name in BELOW}
    found["the code of txtrain"] = digest(sorted(PACKAGE.rglob("*.py")), PACKAGE)
    for name in imports:
        file = getattr(sys.modules.get(module_name(name)), "__file__", None)
        if file is not None:
            found[f"the code of {name}"] = digest([Path(file)], Path(file).parent)
    return found


def digest(files: Iterable[Path], folder: Path) -> str:
    """A digest of the files: their names relative to the folder, and their contents."""
    made = hashlib.blake2b(digest_size=6)
    for file in files:
        content = file.read_bytes()
        made.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return made.hexdigest()


def environment(device: str, processes: int) -> dict[str, Any]:
    """What run.json says of the machine and the software."""
    return {
        "versions": {
            "txtrain": sys.modules["txtrain"].__version__,  # no import: the package itself is above all rooms
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": _version("lightning"),
        },
        "git_commit": git_commit(),
        "hardware": {
            "device": device, "processes": processes, "threads": torch.get_num_threads(), "host": platform.node(),
            "platform": platform.platform(),
        },
    }


def git_commit() -> str | None:
    """The commit of the working directory; None outside a repository.

    Not whether files differ from it: what compares them (`status`, `diff`, `describe --dirty`) executes programs that
    the repository's own configuration names (core.fsmonitor, filter.*.clean), and it may be a stranger's.
    """
    try:
        found = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"

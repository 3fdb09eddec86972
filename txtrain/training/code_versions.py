"""Whether the processes of a run compute with the same code: of this package, of the user's files, and of what they stand on."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from txtrain.config.user_code import module_name

PACKAGE = Path(__file__).resolve().parents[1]
BELOW = ("torch", "lightning", "deepspeed")  # what a step is made with


def versions(imports: Sequence[str] = ()) -> dict[str, str]:
    """By what each is called. Of code that is edited more often than numbered, a digest of its files.

    imports: what the configuration imports; it has been imported.
    """
    found = {f"the version of {name}": _version(name) for name in BELOW}
    found["the code of txtrain"] = digest(sorted(PACKAGE.rglob("*.py")), PACKAGE)
    for name in imports:
        file = getattr(sys.modules.get(module_name(name)), "__file__", None)
        if file is not None:
            found[f"the code of {name}"] = digest([Path(file)], Path(file).parent)
    return found


def digest(files: Iterable[Path], folder: Path) -> str:
    """Of the files' names below the folder, and of what they hold."""
    made = hashlib.blake2b(digest_size=6)
    for file in files:
        content = file.read_bytes()
        made.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return made.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"

"""A file of results that an interrupted command goes on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from txtrain.errors import ConfigError
from txtrain.ground import files


class PartFile:
    """`OUT.part`, which becomes OUT once it is whole; beside it `OUT.part.id`, of the command that writes it."""

    def __init__(self, out: Path, identity: str) -> None:
        self.out = out
        self.part, self.id = (out.with_name(f"{out.name}.part{end}") for end in ("", ".id"))
        if self.part.exists() and (not self.id.exists() or self.id.read_text(encoding="utf-8") != identity):
            raise ConfigError(
                f"`out`: {self.part} is of another checkpoint, other data or other keys: give its own, or remove it."
            )
        with files.writing(out.parent, "out"):
            out.parent.mkdir(parents=True, exist_ok=True)
            files.write(self.id, identity)
        self._file: Any = None

    def begin(self, step: int) -> int:
        """Keep whole steps of rows; returns their number, where to go on."""
        raw = self.part.read_bytes() if self.part.exists() else b""
        lines = raw.split(b"\n")[:-1]
        kept = lines[: len(lines) // step * step]
        self._file = self.part.open("r+b" if raw else "wb")
        self._file.truncate(sum(len(line) + 1 for line in kept))
        self._file.seek(0, 2)
        return len(kept)

    def write(self, lines: Sequence[str]) -> None:
        with files.writing(self.out.parent, "out"):
            self._file.write("".join(f"{line}\n" for line in lines).encode())
            self._file.flush()

    def finish(self) -> None:
        with files.writing(self.out.parent, "out"):
            self._file.close()
            files.sync(self.part)
            self.part.replace(self.out)
            self.id.unlink()

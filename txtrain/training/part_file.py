"""A file of results that an interrupted command goes on with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from txtrain.errors import ConfigError
from txtrain.ground import files
from txtrain.ground.plain_files import check_file, read_bytes

_CHUNK = 1 << 20  # bytes that are looked through at once: embeddings of many rows are larger than the memory


class PartFile:
    """`OUT.part`, which becomes OUT once it is whole; beside it `OUT.part.id`, of the command that writes it."""

    def __init__(self, out: Path, identity: str) -> None:
        self.out = out
        self.part, self.id = (out.with_name(f"{out.name}.part{end}") for end in ("", ".id"))
        for file in filter(os.path.lexists, (self.part, self.id)):  # a stranger's folder may hold links and pipes
            check_file(file, limit=None)
        if self.part.exists() and (not self.id.exists() or read_bytes(self.id) != identity.encode()):
            raise ConfigError(
                f"`out`: {self.part} is of another checkpoint, other data or other keys: give its own, or remove it."
            )
        with files.writing(out.parent, "out"):
            out.parent.mkdir(parents=True, exist_ok=True)
            files.write(self.id, identity)
        self._file: Any = None

    def begin(self, step: int) -> int:
        """Keep whole steps of rows; returns their number, where to go on."""
        n, kept, end, at = 0, 0, 0, 0  # lines; those of whole steps, and the byte behind them; bytes
        with files.writing(self.out.parent, "out"):
            self._file = self.part.open("a+b")
            self._file.seek(0)
            while chunk := self._file.read(_CHUNK):
                ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
                if (whole := (n + len(ends)) // step * step) > n:
                    kept, end = whole, at + int(ends[whole - n - 1]) + 1
                n, at = n + len(ends), at + len(chunk)
            self._file.truncate(end)
        return kept

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

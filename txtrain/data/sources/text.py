"""data=text: the user's own files: a text file is one document; .jsonl and .parquet have one per row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from txtrain.data.sources.documents import KINDS, documents_of, has_rows
from txtrain.data.sources.files import PACKED, Limits, Text, files_identity, find_files
from txtrain.data.sources.origins import refuse_shared
from txtrain.data.sources.source import Split
from txtrain.errors import ConfigError


class TextFiles:
    """Files, globs, folders, or a list of them; files may be compressed (.gz, .zst).

    Raises:
        ConfigError: a path does not exist, or a file is in both path and val_path.
    """

    def __init__(
        self,
        path: str | tuple[str, ...] | None,
        val_path: str | tuple[str, ...] | Mapping[str, str] | None = None,
        text_column: str = "text",
        max_expansion: float = Limits().max_expansion,
        max_text_bytes: int = Limits().max_text_bytes,
        encoding_errors: str = Limits().encoding_errors,
        bad_rows: str = "refuse",
    ) -> None:
        if not path:
            raise ConfigError(
                "`data.path` must be given with data=text: a file, a glob, or a folder of .txt, .jsonl or .parquet "
                "files."
            )
        self.files: dict[Split, list[Path]] = {"train": find_files(path, "data.path", KINDS)}
        self.named: dict[str, list[Path]] = {}  # named validation sets
        if isinstance(val_path, Mapping):
            self.named = {name: find_files(one, f"data.val_path.{name}", KINDS) for name, one in val_path.items()}
        elif val_path:
            self.files["validation"] = find_files(val_path, "data.val_path", KINDS)
        held = {file for files in (self.files.get("validation", []), *self.named.values()) for file in files}
        refuse_shared(self.files["train"], held)
        self.path, self.text_column, self.bad_rows = path, text_column, bad_rows
        self.skipped: dict[str, str] | None = {} if bad_rows == "skip" else None
        self.limits = Limits(max_expansion, max_text_bytes, encoding_errors, self.skipped)
        self.has_validation = bool(val_path)

    def documents(self, split: Split) -> Iterator[Text]:
        key = "data.path" if split == "train" else "data.val_path"
        for file in self.files.get(split, ()):
            yield from documents_of(file, key, self.text_column, self.limits)

    def validation_sets(self) -> dict[str, TextFiles]:
        """A source for each named set, with all documents in its training split."""
        return {
            name: TextFiles(tuple(map(str, files)), None, self.text_column, *self.limits[:3], self.bad_rows)
            for name, files in self.named.items()
        }

    def identity(self) -> str:
        column = f"{self.text_column} " if any(map(has_rows, self._all)) else ""
        return self.limits.identity + column + " ".join(files_identity(files) for files in self.files.values())

    def describe(self) -> str:
        n = len(self._all)
        return (
            f"{self.path if isinstance(self.path, str) else ', '.join(self.path)} "
            f"({n} file{'s' * (n > 1)}, {self._on_disk / 1e6:.1f} MB)"
        )

    @property
    def n_bytes(self) -> int | None:
        """None if the size of the text is not that of its files."""
        return None if any(f.suffix in PACKED or has_rows(f) for f in self._all) else self._on_disk

    @property
    def _on_disk(self) -> int:
        return sum(p.stat().st_size for p in self._all)

    @property
    def _all(self) -> list[Path]:
        return [file for files in self.files.values() for file in files]

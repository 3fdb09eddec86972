"""data=hf: a text column of whatever `datasets.load_dataset` takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from txtrain.data.hub import HubUnreachable, load_dataset
from txtrain.data.sources import Split
from txtrain.errors import ConfigError, hint

_LOADERS = ("arrow", "csv", "json", "parquet", "text", "xml")  # load_dataset would read the current folder with these


class HubDataset:
    """One document a row.

    Raises:
        ConfigError: the set, its split or its column does not exist, or the validation rows are training rows.
    """

    def __init__(self, path: str | None, name: str | None, split: str, val_split: str | None, val_path: str | None, text_column: str) -> None:
        if not path:
            raise ConfigError("`data.path` must be given with data=hf: a name on the hub, or a local folder, as load_dataset takes it.")
        self.path, self.name, self.split, self.text_column = path, name, split, text_column
        self.rows: dict[Split, Any] = {"train": self._load(path, "data.path", split)}
        available = self.rows["train"].info.splits or {}
        if val_path:
            self.rows["validation"] = self._load(val_path, "data.val_path", val_split or split)
        elif val_split or ("validation" in available and "validation" not in _names(split)):
            self.rows["validation"] = self._load(path, "data.val_split", val_split or "validation")
            _refuse_overlap(split, val_split or "validation", {k: v.num_examples for k, v in available.items()})
        self.has_validation = "validation" in self.rows

    def documents(self, split: Split) -> Iterator[str]:
        for batch in self.rows[split].select_columns([self.text_column]).iter(batch_size=1000):
            yield from (text for text in batch[self.text_column] if text)

    def identity(self) -> str:
        return f"hf {self.text_column} {' '.join(rows._fingerprint for rows in self.rows.values())}"

    def describe(self) -> str:
        return f"{self.path}{f' {self.name}' if self.name else ''} ({len(self.rows['train']):,} rows of {self.split}, column {self.text_column})"

    def _load(self, path: str, key: str, split: str) -> Any:
        from datasets.exceptions import DatasetsError

        if path in _LOADERS:
            raise ConfigError(f"`{key}` must be a set, a folder or a file, but {path} is only the name of a loader. Name your files' folder; its kind is seen.")
        try:
            rows = load_dataset(path, self.name, split)
        except HubUnreachable as e:
            raise ConfigError(f"`{key}`: {path} cannot be had: {e}. A local .jsonl, .csv or .parquet, or a folder of them, needs no hub.") from e
        except (FileNotFoundError, ValueError, DatasetsError) as e:
            said = str(e.__cause__ or e).splitlines()[0]
            raise ConfigError(f"`{key}` must be what load_dataset takes, but {path} ({split}) is not: {said}") from e
        columns = rows.column_names
        if self.text_column not in columns:
            raise ConfigError(
                f"`data.text_column` must be one of {', '.join(columns)} for {path}, but is {self.text_column} instead.{hint(self.text_column, columns)}"
            )
        kind = rows.features[self.text_column].dtype
        if kind not in ("string", "large_string"):
            raise ConfigError(f"`data.text_column` must hold text, but {self.text_column} of {path} holds {kind} instead.")
        return rows


def _names(split: str) -> set[str]:
    """The splits that a spec such as `train[:90%]+extra` draws on."""
    return {re.match(r"\w*", part.strip()).group() for part in split.split("+")}  # type: ignore[union-attr]


def _refuse_overlap(split: str, val_split: str, sizes: dict[str, int]) -> None:
    if not _names(split) & _names(val_split):
        return
    from datasets import ReadInstruction

    taken = [(i.splitname, i.from_, i.to) for i in ReadInstruction.from_spec(split).to_absolute(sizes)]
    for held in ReadInstruction.from_spec(val_split).to_absolute(sizes):
        for name, begin, end in taken:
            if name == held.splitname and max(begin, held.from_) < min(end, held.to):
                raise ConfigError(
                    f"`data.val_split` must not overlap data.split, but {val_split} and {split} share rows {max(begin, held.from_)} "
                    f"to {min(end, held.to) - 1} of {name}."
                )

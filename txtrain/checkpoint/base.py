"""An adapter, and its base: where its weights are, and the hash by which they are known. No torch."""

from __future__ import annotations

import dataclasses as dc
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from txtrain.checkpoint.format import LoadError, locate
from txtrain.errors import ConfigError, shorten
from txtrain.ground import files, plain_files
from txtrain.hf.digest import BASE, sha256_of
from txtrain.hf.hub import folder_of
from txtrain.hf.lora_config import ADAPTER_CONFIG

if TYPE_CHECKING:
    from torch import Tensor

    from txtrain.model.lora import Pair


@dc.dataclass(frozen=True)
class Base:
    """path: of a checkpoint or a Hugging Face folder. sha256: of its weights; empty: unknown."""

    path: str
    sha256: str = ""

    def write(self, folder: Path) -> None:
        files.write(folder / BASE, json.dumps(dc.asdict(self), indent=1))


@dc.dataclass(frozen=True)
class Adapter:
    """pairs: by matrix, in float32. whole: what is trained beside them, by name. base: as its own files name it."""

    pairs: dict[str, Pair]
    whole: dict[str, Tensor]
    base: Base | None

    @property
    def tensors(self) -> Iterator[Tensor]:
        yield from (factor for pair in self.pairs.values() for factor in (pair.A, pair.B))
        yield from self.whole.values()


def identify(where: str | Path, key: str) -> Base:
    """What holds the weights now, a checkpoint of a run for example, and their hash. Reads a folder's files whole; of a
    checkpoint the headers, which hold the checksums of the tensors.

    Raises:
        ConfigError: as `resolve`.
    """
    path = resolve(where, key)
    return Base(str(path.resolve()), sha256_of(path))


def resolve(where: str | os.PathLike[str], key: str) -> Path:
    """The folder or checkpoint that `where` means now.

    Raises:
        ConfigError: it is neither, nor a run or a folder of runs with a checkpoint.
    """
    folder = folder_of(where, key)
    return folder if is_folder(folder) else locate(folder, key)


def is_folder(path: Path) -> bool:
    """Whether it is a folder of Hugging Face's kind: a model, or PEFT's adapter."""
    return (path / "config.json").is_file() or (path / ADAPTER_CONFIG).is_file()


def read_base(path: Path) -> Base | None:
    """Of a checkpoint; None if it holds a whole model.

    Raises:
        ConfigError: the file is damaged.
    """
    if not (path / BASE).is_file():
        return None
    raw = plain_files.read_json(path / BASE)
    plain_files.check_keys(raw, str(path / BASE), {"path": str, "sha256": str})
    if not re.fullmatch("[0-9a-f]{64}", raw["sha256"]):
        raise ConfigError(f"{path / BASE}: `sha256` must be a hash, but is {raw['sha256'][:80]!r} instead.")
    return Base(raw["path"], raw["sha256"])


def check_base(base: Base, path: Path, key: str) -> None:
    """Refuse other weights than those that an adapter was trained on.

    Args:
        base: what the adapter names. path: what is there. key: the setting that names the adapter.

    Raises:
        LoadError: they are others.
    """
    if base.sha256 and (found := sha256_of(path)) != base.sha256:
        raise LoadError(
            f"`{key}`: the adapter was trained on the weights with the hash {base.sha256[:16]}, "
            f"but those in {path} have {found[:16]}. Give it the weights that it was trained on."
        )


def missing(base: Base, key: str) -> ConfigError:
    """The error where a base is not there."""
    return ConfigError(
        f"`{key}` holds an adapter alone, and its base {shorten(repr(base.path))} is not there. Put it back, or in "
        "Python: txtrain.load_pretrained(BASE, adapter=DIR)."
    )

"""The headers of safetensors files, and the tensors' names in them. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from txtrain.errors import ConfigError
from txtrain.ground import plain_files
from txtrain.hf.folder import member
from txtrain.model.config import ModelConfig

CHECKSUMS = "txtrain"  # key of a checkpoint's id and checksums in the metadata of its shards' headers
_UNSEEN = 100_000  # layers whose tensors are not known; the largest models have hundreds


def read_header(path: Path) -> tuple[Mapping[str, Any], int]:
    """A safetensors file's header (tensors and `__metadata__`), and the byte at which the tensors begin.

    Raises:
        ConfigError: the header is damaged.
    """
    plain_files.check_file(path, limit=None)
    stat = path.stat()
    return parse_header(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=8)
def parse_header(path: Path, size: int, changed: int, inode: int) -> tuple[Mapping[str, Any], int]:
    """changed, inode: of the file, so that a header is parsed once while it is unchanged."""
    with path.open("rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if size < 8 or n > min(plain_files.TENSORS_LIMIT, size - 8):
            sizes = f"its header is to have {n:,} bytes, the file has {size:,}"
            raise ConfigError(f"{path} must be a whole safetensors file, but {sizes}.")
        header = plain_files.parse_json(f.read(n), f"The header of {path}")
        plain_files.check_keys(header, f"The header of {path}", {"__metadata__": dict | None})
        return header, 8 + n


def tensor_names(folder: Path) -> frozenset[str] | None:
    """Names in a folder's safetensors; None if it has only pickles, or a broken file (which weights.py reports)."""
    if (path := member(folder, "model.safetensors")) is not None:
        return names_in([path])
    if (path := member(folder, "model.safetensors.index.json")) is not None:
        places = plain_files.read_json(path, plain_files.TENSORS_LIMIT).get("weight_map")
        return frozenset(places) if isinstance(places, dict) else None
    return None


def names_in(files: Iterable[Path]) -> frozenset[str] | None:
    """The names of the tensors in safetensors files; None if a file is broken."""
    try:
        return frozenset(name for path in files for name in read_header(path)[0]) - {"__metadata__"}
    except ConfigError:
        return None


def check_layers(model: ModelConfig, names: frozenset[str] | None, where: str) -> None:
    """Raise a ConfigError if there are more layers than tensors: a config may claim any number, the files cannot.

    names: None: they are not known, or not yet.
    """
    n_layers = model.n_layers + model.encoder_layers + model.mtp_depth
    if names is None and n_layers > _UNSEEN:
        raise ConfigError(f"{where} must describe at most {_UNSEEN:,} layers, but describes {n_layers:,}.")
    if names is not None and n_layers > len(names):
        raise ConfigError(f"{where} describes {n_layers:,} layers, but the files hold {len(names):,} tensors.")

"""The hash by which weights are known. No torch."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from txtrain.ground.plain_files import check_file
from txtrain.hf.tensor_names import CHECKSUMS, read_header

BASE = "base.json"  # beside a checkpoint that holds an adapter alone
# The first that is there: a folder may hold the same weights twice.
_WEIGHTS = ("model.safetensors", "model-*.safetensors", "*.safetensors", "pytorch_model*.bin")


def sha256_of(path: Path) -> str:
    """Of the weights in a checkpoint or a Hugging Face folder: of their file; of several, of the lines that `sha256sum`
    prints of them. Of a checkpoint's shard the header is hashed, which holds the checksums of its tensors."""
    found = next((files for pattern in _WEIGHTS if (files := sorted(path.glob(pattern)))), [])
    found += [path / BASE] if (path / BASE).is_file() else []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        stats = [(file, file.stat()) for file in found]
        sums = list(pool.map(lambda one: _digest(one[0], one[1].st_size, one[1].st_mtime_ns), stats))
    lines = "".join(f"{digest}  {file.name}\n" for digest, file in zip(sums, found, strict=True))
    return sums[0] if len(sums) == 1 else hashlib.sha256(lines.encode()).hexdigest()


@lru_cache(maxsize=256)
def _digest(file: Path, size: int, changed: int) -> str:
    """size, changed: of the file; a start asks for the same ones several times."""
    check_file(file, limit=None)  # opening a pipe would wait
    header, end = read_header(file) if file.suffix == ".safetensors" else ({}, 0)
    with file.open("rb") as f:
        if CHECKSUMS in (header.get("__metadata__") or {}):
            return hashlib.sha256(f.read(end)).hexdigest()
        return hashlib.file_digest(f, "sha256").hexdigest()

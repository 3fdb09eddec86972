"""The names of a folder's tensors, where its files tell them without torch."""

from __future__ import annotations

from pathlib import Path

from txtrain.hf import strict_json
from txtrain.hf.folder import member


def tensor_names(folder: Path) -> frozenset[str] | None:
    """Of safetensors, in one file or several; None: only a pickle would know, or the file is broken (weights.py says how)."""
    if (path := member(folder, "model.safetensors")) is not None:
        with path.open("rb") as f:
            n = int.from_bytes(f.read(8), "little")
            whole = n <= min(strict_json.LIMIT, path.stat().st_size - 8)
            return frozenset(strict_json.parse(f.read(n), f"The header of {path}")) - {"__metadata__"} if whole else None
    if (path := member(folder, "model.safetensors.index.json")) is not None:
        places = strict_json.read(path).get("weight_map")
        return frozenset(places) if isinstance(places, dict) else None
    return None

"""A rollout in a checkpoint: its tensors, and the texts that samples.txt shows of it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from txtrain.errors import ConfigError, shorten
from txtrain.ground.plain_files import parse_json, read_npz

FILE = "rollout.npz"
_TENSORS = (
    "number", "input_ids", "attention_mask", "labels", "old_log_probs", "sampler_log_probs", "advantages", "total",
    "rewards", "ended", "n_new",
)
_TEXTS = "texts"  # JSON in bytes
_WHOLE = 1 << 40  # nothing of a checkpoint is compressed


class Sampled(NamedTuple):
    """A completion and its rewards by name."""

    prompt: str
    completion: str
    rewards: Mapping[str, float]


def write(folder: Path, tensors: Mapping[str, Tensor], texts: Sequence[Sampled]) -> None:
    """Nothing before the first rollout."""
    if tensors:
        kept = {name: value.numpy() for name, value in tensors.items()}
        kept[_TEXTS] = np.frombuffer(json.dumps({_TEXTS: texts}).encode(), np.uint8)
        np.savez(folder / FILE, **kept)  # type: ignore[arg-type]


def read(folder: Path, with_reference: bool) -> tuple[dict[str, Tensor], list[Sampled]] | None:
    """None: saved before the first rollout was complete.

    Raises:
        ConfigError: the file is damaged.
    """
    file = folder / FILE
    if not file.exists():
        return None
    names = (*_TENSORS, *(["reference_log_probs"] if with_reference else []))
    return {name: torch.from_numpy(read_npz(file, name, str(file), _WHOLE)) for name in names}, _texts_in(file)


def _texts_in(file: Path) -> list[Sampled]:
    """Those of a rollout's file; none in one that was written before they were kept.

    Raises:
        ConfigError: they are no texts with their rewards.
    """
    with zipfile.ZipFile(file) as archive:
        if f"{_TEXTS}.npy" not in archive.namelist():
            return []
    where = f"{file}: {_TEXTS}"
    raw = read_npz(file, _TEXTS, str(file), _WHOLE).tobytes()
    found: Any = parse_json(raw, where, whole=False).get(_TEXTS)
    try:
        return [Sampled(str(a), str(b), {name: float(v) for name, v in of.items()}) for a, b, of in found]
    except (AttributeError, TypeError, ValueError) as e:
        raise ConfigError(f"{where} must be texts with their rewards, but is damaged: {shorten(e)}.") from e

"""Folders as transformers writes them, without transformers."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.models import seeded, shake, tiny
from txtrain.hf.save import save_pretrained


def llama(folder: Path, **changes: Any) -> Path:
    """Two layers, tied or not as the changes say."""
    save_pretrained(shake(seeded(tiny(**changes))), folder)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit_config(folder: Path, **changes: Any) -> Path:
    """... takes a field away."""
    config = {name: value for name, value in {**config_of(folder), **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder

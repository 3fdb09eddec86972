"""A trained model from a run's folder or one of its checkpoints, with the tokenizer that it was trained with."""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from txtrain import checkpoint
from txtrain.errors import ConfigError
from txtrain.model.config import ModelConfig
from txtrain.typed import build

if TYPE_CHECKING:
    import torch

    from txtrain.data.tokenizer import Tokenizer
    from txtrain.model.transformer import Transformer


@dc.dataclass(frozen=True)
class Loaded:
    """path: the checkpoint's own folder. tokenizer: None where the run had none."""

    path: Path
    model: Transformer
    tokenizer: Tokenizer | None


def load(where: str | Path, device: torch.device | str = "cpu") -> Loaded:
    """The model of a checkpoint (a run's newest one), on the device, in evaluation mode.

    Raises:
        ConfigError: there is no checkpoint, it is damaged, or it needs components that were not imported.
    """
    import torch

    from txtrain.data.tokenizer import Tokenizer
    from txtrain.model.build import build_model

    path = checkpoint.locate(where)
    checkpoint.verify(path)
    config = model_config(path)
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device=device)
    checkpoint.load_weights(path, model)
    folder = path / "tokenizer"
    return Loaded(path, model.eval(), Tokenizer.load(folder) if folder.is_dir() else None)


def model_config(path: Path) -> ModelConfig:
    """From a checkpoint's config.yaml, which is data: what it names in `imports` is not imported."""
    raw = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    try:
        return build(ModelConfig, raw["model"])
    except ConfigError as e:
        if not raw.get("imports"):
            raise
        again = f"imports=[{','.join(raw['imports'])}]"
        raise ConfigError(*e.problems, f"`checkpoint`: its run used {again}. Code is never imported by a checkpoint's word: name it again.") from e

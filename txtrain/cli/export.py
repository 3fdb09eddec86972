"""`txtrain export`: a checkpoint leaves as a folder that tools of Hugging Face load."""

from __future__ import annotations

from pathlib import Path

from txtrain.checkpoint.load import load
from txtrain.config.composed import Composed
from txtrain.config.schema import Export
from txtrain.errors import ConfigError
from txtrain.hf.save import save_pretrained


def run_export(job: Composed) -> int:
    """Write the folder.

    Raises:
        ConfigError: no such checkpoint, the folder is not empty, or no class of transformers equals the model.
    """
    config: Export = job.config
    assert config.checkpoint is not None
    assert config.out is not None
    out = Path(config.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"`out` must be a new or empty folder, but {config.out!r} is {'not empty' if out.is_dir() else 'a file'}.")
    loaded = load(config.checkpoint, weights=config.weights, finite=not config.allow_nonfinite)
    save_pretrained(loaded.model, out, loaded.tokenizer)
    n = sum(p.numel() for p in loaded.model.parameters())
    print(f"{loaded.path} -> {out}: {n:,} parameters, {'with its tokenizer' if loaded.tokenizer else 'no tokenizer'}")
    return 0

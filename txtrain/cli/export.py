"""`txtrain export`: a checkpoint as a folder that Hugging Face tools load."""

from __future__ import annotations

import contextlib
from pathlib import Path

from txtrain.checkpoint.load import Loaded, load
from txtrain.config.composed import Composed
from txtrain.config.schema import Export
from txtrain.errors import ConfigError
from txtrain.ground import files
from txtrain.hf.registry import CONFIG
from txtrain.hf.save import save_pretrained


def run_export(job: Composed) -> int:
    """Write the folder.

    Raises:
        ConfigError: no such checkpoint, the folder is not empty, or no class of transformers equals the model.
    """
    config: Export = job.config
    assert config.checkpoint is not None
    assert config.out is not None
    out = files.path_of(config.out, "out")
    files.check_writable(out, "out")
    there = out.exists()
    if there and any(out.iterdir()) and not any(out.glob(".export.*.tmp")):  # left by an export that was killed
        raise ConfigError(f"`out` must be a new or empty folder, but {config.out!r} is not empty.")
    loaded = load(config.checkpoint, weights=config.weights, finite=not config.allow_nonfinite)
    try:
        with files.writing(out, "out"):
            out.mkdir(parents=True, exist_ok=True)
            _write(loaded, out)
    except BaseException:
        if not there:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise
    n = sum(p.numel() for p in loaded.model.parameters())
    print(f"{loaded.path} -> {out}: {n:,} parameters, {'with its tokenizer' if loaded.tokenizer else 'no tokenizer'}")
    return 0


def _write(loaded: Loaded, out: Path) -> None:
    """Write to a temporary folder, then move the files, config.json last: without it no tool sees a model."""
    with files.temporary(out, "export") as made:
        save_pretrained(loaded.model, made, loaded.tokenizer)
        for path in sorted(made.iterdir(), key=lambda path: path.name == CONFIG):
            if path.name != files.LOCK:
                path.replace(out / path.name)

"""`txtrain export`: a checkpoint as a folder that Hugging Face tools load."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from txtrain.checkpoint.base import ADAPTER_CONFIG
from txtrain.checkpoint.load import Loaded, OpenAdapter, load, open_adapter
from txtrain.config.composed import Composed
from txtrain.config.schema import Export
from txtrain.errors import ConfigError
from txtrain.ground import files
from txtrain.hf.peft import save_adapter
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
    how: dict[str, Any] = {"weights": config.weights, "finite": not config.allow_nonfinite}
    loaded: Loaded | OpenAdapter
    if config.merge_adapter:
        loaded = load(config.checkpoint, **how)
        write = partial(save_pretrained, loaded.model, tokenizer=loaded.tokenizer)
        n, what = sum(p.numel() for p in loaded.model.parameters()), "parameters"
    else:
        loaded = open_adapter(config.checkpoint, **how)
        write = partial(_write_adapter, loaded)
        n, what = sum(pair.A.numel() + pair.B.numel() for pair in loaded.adapter.values()), "parameters of an adapter"
    try:
        with files.writing(out, "out"):
            out.mkdir(parents=True, exist_ok=True)
            _write(write, out)
    except BaseException:
        if not there:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise
    print(f"{loaded.path} -> {out}: {n:,} {what}, {'with its tokenizer' if loaded.tokenizer else 'no tokenizer'}")
    if isinstance(loaded, OpenAdapter) and not (Path(loaded.base.path) / CONFIG).is_file():
        print(f"peft needs its base as a folder of Hugging Face: txtrain export checkpoint={loaded.base.path} out=DIR")
    return 0


def _write_adapter(opened: OpenAdapter, out: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in opened.model.state_dict().items()}
    base, config = opened.base, opened.config
    save_adapter(
        opened.adapter, opened.model.config, shapes, out, base.path, base.sha256, config.rslora, config.lora_dropout
    )
    if opened.tokenizer is not None:
        opened.tokenizer.save(out)


def _write(write: Callable[[Path], None], out: Path) -> None:
    """Write to a temporary folder, then move the files, config.json last: without it no tool sees a model."""
    with files.temporary(out, "export") as made:
        write(made)
        for path in sorted(made.iterdir(), key=lambda path: path.name in (CONFIG, ADAPTER_CONFIG)):
            if path.name != files.LOCK:
                path.replace(out / path.name)

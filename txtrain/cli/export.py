"""`txtrain export`: a checkpoint as a folder that Hugging Face tools load, or as a file for llama.cpp."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

from txtrain.checkpoint.load import Opened, open_model
from txtrain.cli import model_card
from txtrain.config.composed import Composed
from txtrain.config.schema import Export
from txtrain.config.units import bytes_of
from txtrain.errors import ConfigError
from txtrain.ground import files
from txtrain.hf import hub
from txtrain.hf.registry import CONFIG


def run_export(job: Composed) -> int:
    """Write the folder.

    Raises:
        ConfigError: no such checkpoint, the folder is not empty, or a part of the model is the user's own and no class
            of transformers equals it.
    """
    config: Export = job.config
    assert config.checkpoint is not None
    assert config.out is not None
    out = files.path_of(config.out, "out")
    files.check_writable(out, "out")
    there = out.exists()
    if there and any(out.iterdir()) and not any(out.glob(".export.*.tmp")):  # left by an export that was killed
        raise ConfigError(f"`out` must be a new or empty folder, but {config.out!r} is not empty.")
    if config.push_to is not None:
        hub.check(config.push_to)
    opened = open_model(config.checkpoint, weights=config.weights, finite=not config.allow_nonfinite)
    try:
        with files.writing(out, "out"):
            out.mkdir(parents=True, exist_ok=True)
            said = _write(opened, out, config)
    except BaseException:
        if not there:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise
    n = sum(p.numel() for p in opened.source.model.parameters())
    print(f"{opened.path} -> {out}: {n:,} parameters, {'with its tokenizer' if opened.tokenizer else 'no tokenizer'}")
    for line in said:
        print(line)
    if config.push_to is not None:
        print(f"{out} -> {hub.push(out, config.push_to)}")
    return 0


def _write(opened: Opened, out: Path, config: Export) -> list[str]:
    """Write to a temporary folder, then move the files, config.json last: without it no tool sees a model.

    Returns what to tell the user.
    """
    import torch

    from txtrain.hf.pieces import Whole
    from txtrain.hf.save import Saved

    dtype, limit = getattr(torch, config.dtype), bytes_of(config.max_shard_size)
    assert limit is not None
    model = opened.source.model
    saved = Saved.of(model, Whole(opened.source), dtype, limit)
    with files.temporary(out, "export") as made, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if config.format == "gguf":
            from txtrain.hf.gguf import write_gguf

            write_gguf(saved, made / f"{model.config.family}.gguf", opened.tokenizer)
        else:
            saved.write(made, opened.tokenizer)
        card = model_card.card(opened.path, saved.hf.architecture, saved.config, config)
        files.write(made / "README.md", card)
        for path in sorted(made.iterdir(), key=lambda path: path.name == CONFIG):
            if path.name != files.LOCK:
                path.replace(out / path.name)
    told = [f"{saved.hf.architecture} of transformers"]
    if saved.leaving.missing is not None:
        (file,) = saved.hf.code()
        told = [
            f"{saved.hf.architecture}, in {file}: load it with trust_remote_code=True",
            f"no class of transformers equals the model; nearest: {saved.leaving.missing}",
        ]
    return [*told, *(str(w.message) for w in caught if issubclass(w.category, UserWarning))]

"""`txtrain export`: a checkpoint as a folder that Hugging Face tools load, or as a file for llama.cpp."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from txtrain.checkpoint.load import OpenAdapter, Opened, open_adapter, open_model
from txtrain.cli import model_card
from txtrain.config.composed import Composed
from txtrain.config.schema_of_trained import Export
from txtrain.config.units import bytes_of
from txtrain.errors import ConfigError, visible
from txtrain.ground import files
from txtrain.hf import push
from txtrain.hf.lora_config import ADAPTER_CONFIG
from txtrain.hf.peft import save_adapter
from txtrain.hf.pieces import shapes_of
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
        push.check(config.push_to)
    how: dict[str, Any] = {"weights": config.weights, "finite": not config.allow_nonfinite}
    opened: Opened | OpenAdapter
    write: Callable[[Path], list[str]]
    if config.merge_adapter:
        opened = open_model(config.checkpoint, **how)
        write = partial(_write_model, opened, config)
        n, what = sum(p.numel() for p in opened.source.model.parameters()), "parameters"
    else:
        opened = open_adapter(config.checkpoint, **how)
        write = partial(_write_adapter, opened)
        n, what = sum(tensor.numel() for tensor in opened.adapter.tensors), "parameters of an adapter"
    try:
        with files.writing(out, "out"):
            out.mkdir(parents=True, exist_ok=True)
            said = _write(write, out)
    except BaseException:
        if not there:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise
    print(f"{opened.path} -> {out}: {n:,} {what}, {'with its tokenizer' if opened.tokenizer else 'no tokenizer'}")
    for line in said:
        print(visible(line))
    if config.push_to is not None:
        print(f"{out} -> {push.push(out, config.push_to)}")
    return 0


def _write(write: Callable[[Path], list[str]], out: Path) -> list[str]:
    """Write to a temporary folder, then move the files, config.json last: without it no tool sees a model.

    Returns what to tell the user.
    """
    with files.temporary(out, "export") as made, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told = write(made)
        for path in sorted(made.iterdir(), key=lambda path: path.name in (CONFIG, ADAPTER_CONFIG)):
            if path.name != files.LOCK:
                path.replace(out / path.name)
    return [*told, *(str(w.message) for w in caught if issubclass(w.category, UserWarning))]


def _write_model(opened: Opened, config: Export, out: Path) -> list[str]:
    import torch

    from txtrain.hf.pieces import Whole
    from txtrain.hf.save import Saved

    dtype, limit = getattr(torch, config.dtype), bytes_of(config.max_shard_size)
    assert limit is not None
    model = opened.source.model
    with contextlib.closing(opened.source):
        saved = Saved.of(model, Whole(opened.source), dtype, limit, finite=not config.allow_nonfinite)
        card = model_card.card(opened.path, saved.hf.architecture, saved.config, config)  # may refuse; weights are dear
        has_tokenizer = True
        if config.format == "gguf":
            from txtrain.hf.gguf import write_gguf

            has_tokenizer = write_gguf(saved, out / f"{model.config.family}.gguf", opened.tokenizer)
        else:
            saved.write(out, opened.tokenizer)
    files.write(out / "README.md", card)
    if not has_tokenizer:
        why = "llama.cpp knows none that splits texts alike" if opened.tokenizer is not None else "there is none"
        return [f"{saved.hf.architecture} of transformers, without a tokenizer: {why}"]
    if saved.leaving.missing is None:
        return [f"{saved.hf.architecture} of transformers"]
    (file,) = saved.hf.code()
    return [
        f"{saved.hf.architecture}, in {file}: load it with trust_remote_code=True",
        f"no class of transformers equals the model; nearest: {saved.leaving.missing}",
    ]


def _write_adapter(opened: OpenAdapter, out: Path) -> list[str]:
    base, config, adapter = opened.base, opened.config, opened.adapter
    save_adapter(
        adapter.pairs, opened.model.config, shapes_of(opened.model), out, base.path, base.sha256, config.rslora,
        config.lora_dropout, adapter.whole,
    )
    if opened.tokenizer is not None:
        opened.tokenizer.save(out)
    if (Path(base.path) / CONFIG).is_file():
        return []
    return [f"peft needs its base as a folder of Hugging Face: txtrain export checkpoint={base.path} out=DIR"]

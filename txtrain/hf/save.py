"""A Transformer to a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from txtrain.data.tokenizer.tokenizer import Tokenizer, write_files
from txtrain.errors import ConfigError
from txtrain.ground import files
from txtrain.hf import generation_config
from txtrain.hf.name_map import Shape, stored_tensors
from txtrain.hf.registry import CONFIG, class_of
from txtrain.hf.tensor_file import DTYPES, bytes_of, write_safetensors
from txtrain.hf.tensor_layout import tensors_of, to_theirs
from txtrain.model.transformer import Transformer

SHARD_BYTES = 5_000_000_000
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def save_pretrained(
    model: Transformer, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None, *,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json, model.safetensors (in shards of max_shard_bytes) and the tokenizer.

    The class of transformers is the one whose logits equal the model's. Weights keep their dtype.

    Args:
        tokenizer: None: the files that load_pretrained found with the model.

    Raises:
        ConfigError: no class of transformers equals the model; it says what differs from the nearest. Nothing is
            written.
    """
    _check(model, tokenizer, max_shard_bytes)
    folder = files.path_of(folder, "folder")
    hf = class_of(model.config)
    dtype = _dtype_of(dict(model.named_parameters()))
    tensors = tensors_of(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as e:
        where = f"{str(folder)!r} is or lies below a file"
        raise ConfigError(f"`save_pretrained` must be given a folder, but {where}.") from e
    if lost := hf.lost_dropouts(model.config):
        what = f"{', '.join(lost)}: its logits are equal, but training it further has no such dropout"
        warnings.warn(f"{hf.architecture} has no place for {what}.", stacklevel=2)
    if model.config.mtp_depth:
        what = "the modules that predict further tokens (model.mtp_depth): its logits are equal without them"
        warnings.warn(f"{hf.architecture} has no place for {what}.", stacklevel=2)
    config = hf.write(model.config)
    every = stored_tensors(hf.rows, model.config, {name: tuple(t.shape) for name, t in tensors.items()})
    stored = {s.name: s for s in every}
    dtypes = {name: tensors[s.parts[0]].dtype for name, s in stored.items()}
    shards = _shards({name: s.shape for name, s in stored.items()}, dtypes, max_shard_bytes)
    for name, shapes in shards.items():
        part = folder / f"{name}.tmp"
        write_safetensors(part, shapes, dtypes, lambda name: to_theirs(stored[name], tensors))
        os.replace(part, folder / name)
    written = {*shards, *_write_index(folder, shards, dtypes)}
    for old in folder.iterdir():  # a loader would take the weights of an earlier save
        if _OURS.fullmatch(old.name) and old.name not in written:
            old.unlink()
    if model.config.topology != "encoder":
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        ids = {name: config[name] for name in tokens if name in config}
        content = generation_config.written(model.generation_file, ids)
        (folder / generation_config.FILE).write_bytes(content)
    if tokenizer is not None:
        tokenizer.save(folder)
    else:
        write_files(folder, model.tokenizer_files)
    _write_json(folder / CONFIG, {**config, "dtype": str(dtype).removeprefix("torch.")})


def _check(model: object, tokenizer: object, max_shard_bytes: object) -> None:
    if not isinstance(model, Transformer):
        what = "a model of txtrain.build_model or txtrain.load_pretrained"
        raise ConfigError(f"`model` must be {what}, but is {type(model).__name__} instead.")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise ConfigError(f"`tokenizer` must be a Tokenizer or None, but is {type(tokenizer).__name__} instead.")
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ConfigError(f"`max_shard_bytes` must be at least 1, but is {max_shard_bytes!r} instead.")


def _dtype_of(parameters: Mapping[str, Tensor]) -> torch.dtype:
    kinds = {(p.dtype, p.is_meta) for p in parameters.values()}
    if len(kinds) > 1 or next(iter(kinds)) not in {(dtype, False) for dtype in DTYPES.values()}:
        found = ", ".join(sorted(f"{dtype} without memory" if meta else str(dtype) for dtype, meta in kinds))
        what = "parameters of one floating dtype, in memory, to be saved"
        raise ConfigError(f"`model` must have {what}, but has {found}.")
    return next(iter(kinds))[0]


def _shards(shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype], limit: int) -> dict[str, dict[str, Shape]]:
    """File name -> its tensors, in order; one larger than the limit gets its own file."""
    groups: list[dict[str, Shape]] = [{}]
    for name, shape in shapes.items():
        if groups[-1] and bytes_of({**groups[-1], name: shape}, dtypes) > limit:
            groups.append({})
        groups[-1][name] = shape
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_index(folder: Path, shards: Mapping[str, Mapping[str, Shape]], dtypes: Mapping[str, Any]) -> list[str]:
    if len(shards) == 1:
        return []
    total = sum(bytes_of(shapes, dtypes) for shapes in shards.values())
    places = {tensor: name for name, shapes in shards.items() for tensor in shapes}
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    return ["model.safetensors.index.json"]


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    files.write(path, json.dumps(content, indent=2) + "\n")

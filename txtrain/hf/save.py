"""A Transformer to a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import dataclasses as dc
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
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import Shape
from txtrain.hf.registry import CONFIG, Leaving, leaving
from txtrain.hf.tensor_file import DTYPES, bytes_of, write_safetensors
from txtrain.hf.tensor_layout import Renumbered, tensors_of, to_theirs
from txtrain.model.transformer import Transformer

SHARD_BYTES = 5_000_000_000
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def save_pretrained(
    model: Transformer, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None, *,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json, model.safetensors (in shards of max_shard_bytes) and the tokenizer.

    The class of transformers is the one whose logits equal the model's. If there is none, the folder has a modeling
    file of its own, which transformers loads with trust_remote_code=True. Weights keep their dtype.

    Args:
        tokenizer: None: the files that load_pretrained found with the model.

    Raises:
        ConfigError: no class of transformers equals the model, and a part of it is your own. Nothing is written.
    """
    _check(model, tokenizer, max_shard_bytes)
    folder = files.path_of(folder, "folder")
    _dtype_of(dict(model.named_parameters()))
    Saved.of(model, max_shard_bytes=max_shard_bytes).write(folder, tokenizer)


@dc.dataclass(frozen=True)
class Saved:
    """What is to be saved. tensors: ours, by name, each read when its turn comes. shapes, dtypes: of all of them.
    finite: refuse a dtype that makes numbers infinite."""

    leaving: Leaving
    model: Transformer
    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, torch.dtype]
    max_shard_bytes: int = SHARD_BYTES
    finite: bool = True

    @classmethod
    def of(
        cls, model: Transformer, tensors: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None,
        max_shard_bytes: int = SHARD_BYTES, finite: bool = True,
    ) -> Saved:
        """tensors: None: the model's, which otherwise may be without memory. dtype: of the parameters in the files;
        None: the model's."""
        leaves, own = leaving(model.config), tensors_of(model)
        tensors = own if tensors is None else tensors
        if leaves.model != model.config:
            tensors = Renumbered(tensors, model.config.dim)
        names = {name for name, _ in model.named_parameters()}
        dtypes = {n: dtype if dtype is not None and n in names else t.dtype for n, t in own.items()}
        shapes = {n: tuple(t.shape) for n, t in own.items()}
        return cls(leaves, model, tensors, shapes, dtypes, max_shard_bytes, finite)

    @property
    def hf(self) -> HFClass:
        return self.leaving.hf

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return {**self.hf.write(self.leaving.model), "dtype": str(self.dtype).removeprefix("torch.")}

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        name, _ = next(self.model.named_parameters())
        return self.dtypes[name]

    def write(self, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as e:
            where = f"{str(folder)!r} is or lies below a file"
            raise ConfigError(f"`save_pretrained` must be given a folder, but {where}.") from e
        self._warn()
        stored = {s.name: s for s in self.hf.stored(self.leaving.model, self.shapes)}
        dtypes = {name: self.dtypes[s.parts[0]] for name, s in stored.items()}
        shards = _shards({name: s.shape for name, s in stored.items()}, dtypes, self.max_shard_bytes)
        for name, held in shards.items():
            part = folder / f"{name}.tmp"
            write_safetensors(
                part, held, dtypes, lambda name: self.cast(to_theirs(stored[name], self.tensors), dtypes[name], name)
            )
            os.replace(part, folder / name)
        written = {*shards, *_write_index(folder, shards, dtypes)}
        for old in folder.iterdir():  # a loader would take the weights of an earlier save
            if _OURS.fullmatch(old.name) and old.name not in written:
                old.unlink()
        config = self.config
        if self.model.config.topology != "encoder":
            tokens = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
            ids = {name: config[name] for name in tokens if name in config}
            content = generation_config.written(self.model.generation_file, ids)
            with files.new(folder / generation_config.FILE) as f:
                f.write(content)
        if tokenizer is not None:
            tokenizer.save(folder)
        else:
            write_files(folder, self.model.tokenizer_files)
        for name, text in self.hf.code().items():
            files.write(folder / name, text)
        _write_json(folder / CONFIG, config)

    def cast(self, tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        """name: of the tensor, for an error.

        Raises:
            ConfigError: a number is too large for the dtype.
        """
        made = tensor.to(dtype)
        if self.finite and made.dtype != tensor.dtype and bool((over := made.isinf() & tensor.isfinite()).any()):
            kind, largest = str(dtype).removeprefix("torch."), tensor[over].abs().max().item()
            wide = "one that holds all weights, such as float32"
            raise ConfigError(
                f"`dtype` must be {wide}, but is {kind} instead: {name} has {largest:g}, which becomes infinite. "
                "To export it all the same: allow_nonfinite=true."
            )
        return made

    def _warn(self) -> None:
        hf, config = self.hf, self.leaving.model
        if lost := hf.lost_dropouts(config):
            what = f"{', '.join(lost)}: its logits are equal, but training it further has no such dropout"
            warnings.warn(f"{hf.architecture} has no place for {what}.", stacklevel=4)
        if config.mtp_depth:
            what = "the modules that predict further tokens (model.mtp_depth): its logits are equal without them"
            warnings.warn(f"{hf.architecture} has no place for {what}.", stacklevel=4)


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

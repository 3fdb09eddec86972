"""What a run, a checkpoint or a folder holds, without reading its weights. No torch."""

from __future__ import annotations

import dataclasses as dc
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint.base import Base, is_folder, read_base
from txtrain.checkpoint.base import missing as base_missing
from txtrain.errors import ConfigError
from txtrain.ground.convert import build, plain
from txtrain.ground.plain_files import check_keys, parse_json, read_json, read_yaml
from txtrain.hf.folder import member
from txtrain.hf.hub import folder_of
from txtrain.hf.lora_config import ADAPTER_CONFIG, CLASSES, PREFIX, WEIGHTS, LoraConfig
from txtrain.hf.tensor_names import check_layers, names_in, read_header, tensor_names
from txtrain.model.config import ModelConfig
from txtrain.objectives import config as _options  # noqa: F401  registers them
from txtrain.registry import TABLE

T = TypeVar("T")


@dc.dataclass(frozen=True)
class Described:
    """path: of the checkpoint or folder. tokenizer: the folder that holds it, or None. base: of an adapter.
    prefix_prompts: of the objective that trained it."""

    path: Path
    model: ModelConfig
    tokenizer: Path | None
    is_hf: bool
    base: Base | None = None
    prefix_prompts: bool = False


def describe(where: str | os.PathLike[str], key: str = "checkpoint") -> Described:
    """What `where` holds, without reading weights or importing torch. key: what an error calls it.

    Raises:
        ConfigError: there is no model, or its config is damaged, hostile or unsupported, or needs other `imports`.
    """
    folder = folder_of(where, key)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        return _described_peft(folder, key)
    if (folder / "config.json").is_file():
        from txtrain.hf.registry import read_config

        _, model = read_config(folder)
        check_layers(model, tensor_names(folder), str(folder / "config.json"))
        return Described(folder, model, _tokenizer_in(folder), True)
    return checkpoint.on_newest(folder, key, partial(_described, key))


def _described_peft(folder: Path, key: str) -> Described:
    """Of PEFT's folder, whose base must be on disk; a relative path is meant from here or from the folder."""
    raw = read_json(folder / ADAPTER_CONFIG)
    check_keys(raw, str(folder / ADAPTER_CONFIG), {"base_model_name_or_path": str | None})
    said = raw.get("base_model_name_or_path") or ""
    there = next((p for p in (os.path.expanduser(said), folder / said) if said and os.path.isdir(p)), None)
    if there is None:
        raise base_missing(Base(said), key)
    path = Path(there)
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        raise ConfigError(f"{folder / ADAPTER_CONFIG}: `base_model_name_or_path` must be a model, not an adapter.")
    found = describe(path, key)
    model, tokenizer = of_peft(folder, found.model), _tokenizer_in(folder) or found.tokenizer
    return Described(folder, model, tokenizer, True, Base(str(path)))


def of_peft(folder: Path, base: ModelConfig) -> ModelConfig:
    """The model of PEFT's folder: the base, with the head of classes that the folder holds in place of another."""
    from txtrain.hf import registry  # with all families

    weights = member(folder, WEIGHTS)
    if weights is None:
        return base  # told where it is read
    header, _ = read_header(weights)
    rows = (row for hf in registry.CLASSES if hf.family == base.family for row in hf.rows)
    names = (f"{PREFIX}{row.theirs}.weight" for row in rows if row.ours == ("head.classifier",))
    held = [header[name] for name in names if name in header]
    shape = held[0].get("shape") if held and isinstance(held[0], dict) else None
    if not (isinstance(shape, list) and shape and type(shape[0]) is int and shape[0] > 0):
        return base
    n, there = shape[0], base.head
    if there.pools and there.n_outputs == n:
        return base
    head: dict[str, Any] = {"type": "class", "n_classes": n, "kind": "regression" if n == 1 else "single"}
    said = (header.get("__metadata__") or {}).get(CLASSES)
    if isinstance(said, str):
        raw = parse_json(said, f"{weights}: {CLASSES}")
        check_keys(raw, f"{weights}: {CLASSES}", {"label_names": list[str], "kind": str})
        head |= {"label_names": raw["label_names"], "kind": raw["kind"]}
    return build(ModelConfig, plain(base) | {"head": head}, "model", weights)


def _described(key: str, path: Path) -> Described:
    """Of a checkpoint."""
    checkpoint.verify(path, key, tensors=False)
    (model, prefix_prompts), base = _saved_config(path, key), read_base(path)
    if base is None:
        check_layers(model, names_in(path.glob("*.safetensors")), str(path / "config.yaml"))
    return Described(path, model, _tokenizer_in(path / "tokenizer"), False, base, prefix_prompts)


def _tokenizer_in(folder: Path) -> Path | None:
    """The folder itself, if it holds a tokenizer."""
    names = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
    return folder if any((folder / name).is_file() for name in names) else None


def saved_adapter(path: Path) -> Any:
    """The adapter's config in a checkpoint's config.yaml."""
    raw = read_yaml(path / "config.yaml").get("adapter")
    return build(LoraConfig, raw if isinstance(raw, dict) else {}, "adapter", path / "config.yaml")


def on_described(where: str | os.PathLike[str], key: str, do: Callable[[Described], T]) -> T:
    folder = folder_of(where, key)
    if is_folder(folder):
        return do(describe(folder, key))
    return checkpoint.on_newest(folder, key, lambda path: do(_described(key, path)))


def described_adapter(path: Path, where: Path) -> Described:
    found = _described("adapter", path)
    if found.base is None:
        what = "a run with adapter=lora or PEFT's folder"
        raise ConfigError(f"`adapter` must be {what}, but {str(where)!r} has no adapter.")
    return found


def _saved_config(path: Path, key: str) -> tuple[ModelConfig, bool]:
    """From a checkpoint's config.yaml, which is only data: the files in its `imports` are not imported.

    Also whether its objective has prefix_prompts.
    """
    file = path / "config.yaml"
    raw = read_yaml(file)
    check_keys(raw, str(file), {"model": dict, "imports": list[str] | None, "objective": dict | None})
    try:
        model = build(ModelConfig, raw["model"], "model", file)
        objective = TABLE["objective"].get(str((raw.get("objective") or {}).get("type")))  # or one of the user's own
        return model, objective is not None and objective.config.prefix_prompts
    except ConfigError as e:
        if not raw.get("imports"):
            raise
        again = f"imports=[{','.join(raw['imports'])}]"
        raise ConfigError(
            *e.problems,
            f"`{key}`: its run used {again}. A checkpoint's code is never imported by itself: name it again.",
        ) from e

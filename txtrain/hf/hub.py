"""A model by its name on the Hugging Face hub: from the cache, else downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from txtrain.data.tokenizer.folder import SOURCE_FILES
from txtrain.errors import ConfigError
from txtrain.ground.files import path_of

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CONFIGS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "additional_chat_templates/*.jinja",
    *SOURCE_FILES,
)
# In order of preference; a repository may have both.
_WEIGHTS = (
    ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"),
)


def folder_of(where: str | os.PathLike[str], key: str) -> Path:
    """The folder of a name on the hub; any other path as it is. key: what an error calls it.

    Raises:
        ConfigError: there is no such path, and the hub has no such model, or cannot be asked.
    """
    path, name = path_of(where, key), os.fspath(where)
    if os.path.lexists(path) or not _NAME.fullmatch(name) or name.startswith("."):
        return path
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    from txtrain.data.sources.hub import client_errors, said_by, why_unreachable

    allowed = f"`{key}` must be a run's folder, one of its checkpoints, a folder of runs, or a model of Hugging Face"
    try:
        cached, has_weights = _snapshot(name, local_files_only=True)
        if has_weights and (cached / "config.json").is_file():
            return cached
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    if reason := why_unreachable():
        raise ConfigError(f"{allowed}, but {name!r} does not exist, is not in the hub's cache, and {reason}.")
    try:
        return _snapshot(name, local_files_only=False)[0]
    except client_errors() as e:
        raise ConfigError(f"{allowed}, but {name!r} does not exist, and its download fails: {said_by(e)}") from e


def _snapshot(name: str, local_files_only: bool) -> tuple[Path, bool]:
    """The folder in the cache, and whether it holds weights. The files that are asked for are named also where they
    are only looked up: the cache knows the whole repository, and is not complete without the others."""
    from huggingface_hub import snapshot_download

    for weights in _WEIGHTS:
        wanted = [*_CONFIGS, *weights]
        found = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=local_files_only))
        if any((found / file).is_file() for file in weights):
            return found, True
    return found, False

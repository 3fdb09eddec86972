"""generation_config.json: kept byte for byte beside a model; of its values the end tokens are the model's."""

from __future__ import annotations

import dataclasses as dc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from txtrain.errors import ConfigError, shorten
from txtrain.ground.plain_files import parse_json
from txtrain.hf.folder import contents
from txtrain.model.config import ModelConfig

FILE = "generation_config.json"
_ENDS = "eos_token_id"


def read(folder: Path) -> bytes:
    """The file's content; empty if there is none.

    Raises:
        ConfigError: it is empty itself.
    """
    if (found := contents(folder, FILE)) == {FILE: b""}:
        raise ConfigError(f"{folder / FILE} must be a JSON object, but is empty.")
    return found.get(FILE, b"")


def with_ends(model: ModelConfig, raw: bytes, where: str) -> ModelConfig:
    """The model with all end tokens of the file, which transformers prefers to config.json's.

    Raises:
        ConfigError: the file is no JSON object, or they are no tokens.
    """
    ends = _listed(parse_json(raw, where), where) if raw else ()
    return dc.replace(model, eos_token_id=ends[0] if len(ends) == 1 else ends) if ends else model


def written(raw: bytes, ids: Mapping[str, Any]) -> bytes:
    """The file for a model with these token ids: `raw` itself if its end tokens are the model's, or it has none."""
    said = parse_json(raw, FILE) if raw else {"_from_model_config": True}
    ends = ids[_ENDS]
    now = () if ends is None else tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
    if raw and _listed(said, FILE) in ((), now):
        return raw
    return (json.dumps({**said, **(ids if not raw else {_ENDS: ends})}, indent=2) + "\n").encode()


def _listed(said: Mapping[str, Any], where: str) -> tuple[int, ...]:
    ends = said.get(_ENDS)
    listed = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(end) is int and end >= 0 for end in listed):
        allowed = f"a token, a list of tokens or null, but is {shorten(repr(ends))} instead"
        raise ConfigError(f"{where}: `{_ENDS}` must be {allowed}.")
    return tuple(listed)

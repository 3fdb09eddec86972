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
_ENDS, _BANNED, _MADE = "eos_token_id", "bad_words_ids", "_from_model_config"


def read(folder: Path) -> bytes:
    """The file's content; empty if there is none.

    Raises:
        ConfigError: it is empty itself.
    """
    if (found := contents(folder, FILE)) == {FILE: b""}:
        raise ConfigError(f"{folder / FILE} must be a JSON object, but is empty.")
    return found.get(FILE, b"")


def of_model(raw: bytes, where: str) -> bytes:
    """The file for a folder that has none but forbids tokens in its config.json, where older folders do; else empty.

    raw: the config.json.
    """
    words = parse_json(raw, where).get(_BANNED)
    return json.dumps({_MADE: True, _BANNED: words}).encode() if words else b""


def with_ends(model: ModelConfig, raw: bytes, where: str) -> ModelConfig:
    """The model with all end tokens of the file, which transformers prefers to config.json's.

    Raises:
        ConfigError: the file is no JSON object, or they are no tokens.
    """
    ends = _listed(parse_json(raw, where), where) if raw else ()
    return dc.replace(model, eos_token_id=ends[0] if len(ends) == 1 else ends) if ends else model


def banned(model: ModelConfig, raw: bytes, where: str) -> tuple[int, ...]:
    """The tokens that must not be generated: the words of one token in bad_words_ids, as in transformers no end token.

    Raises:
        ConfigError: it is no JSON object, or they are no lists of tokens.
    """
    words = (parse_json(raw, where).get(_BANNED) if raw else None) or []
    if not isinstance(words, list) or not all(isinstance(word, list) and all(map(_is_token, word)) for word in words):
        allowed = f"a list of lists of tokens or null, but is {shorten(repr(words))} instead"
        raise ConfigError(f"{where}: `{_BANNED}` must be {allowed}.")
    given = model.eos_token_id
    ends = given if isinstance(given, tuple) else (given,)
    return tuple(word[0] for word in words if len(word) == 1 and word[0] not in ends and word[0] < model.vocab_size)


def written(raw: bytes, ids: Mapping[str, Any]) -> bytes:
    """The file for a model with these token ids: `raw` itself if its end tokens are the model's, or it has none."""
    said = parse_json(raw, FILE) if raw else {_MADE: True}
    made = said.keys() <= {_MADE, _BANNED}  # `of_model`
    ends = ids[_ENDS]
    now = () if ends is None else tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
    if not made and _listed(said, FILE) in ((), now):
        return raw
    return (json.dumps({**said, **(ids if made else {_ENDS: ends})}, indent=2) + "\n").encode()


def _listed(said: Mapping[str, Any], where: str) -> tuple[int, ...]:
    ends = said.get(_ENDS)
    listed = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(map(_is_token, listed)):
        allowed = f"a token, a list of tokens or null, but is {shorten(repr(ends))} instead"
        raise ConfigError(f"{where}: `{_ENDS}` must be {allowed}.")
    return tuple(listed)


def _is_token(value: object) -> bool:
    return type(value) is int and value >= 0

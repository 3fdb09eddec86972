"""`init_from=`: architecture and tokenizer of a trained model, for a run that starts from its weights. No torch."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from txtrain.convert import plain
from txtrain.errors import ConfigError

if TYPE_CHECKING:
    from txtrain.config.compose import Composed
    from txtrain.model.config import ModelConfig

# What a model may have otherwise than its weights were trained with: labels, how it would have been initialised, and dropout.
_FREE = ("family", "size", "published", "init", "dropout", "output_dropout", "bos_token_id", "eos_token_id", "pad_token_id")
_DROPOUTS = ("model.dropout", "model.output_dropout", "model.attention.dropout", "model.ffn.dropout")


def applied(composed: Composed) -> Composed:
    """The configuration with what comes along with its init_from.

    Raises:
        ConfigError: there is no model there, `model=` beside it says something else, or it brings no tokenizer and none is given.
    """
    config = composed.config
    where = getattr(config, "init_from", None)
    if where is None:
        return composed
    from txtrain.checkpoint.load import describe

    found = describe(where, key="init_from")
    changes: dict[str, Any] = {"model": _model(composed, found.model)}
    if "data.tokenizer" not in composed.given and config.data.tokenizer == "train":
        if found.tokenizer is None:
            raise ConfigError(f"`data.tokenizer` must be given with init_from={where}: no tokenizer came along with it.")
        changes["data"] = dc.replace(config.data, tokenizer=str(found.tokenizer))
    config = dc.replace(config, **changes)
    if problems := list(config.check()):
        raise ConfigError(*problems)
    return dc.replace(composed, config=config, grafts={})


def _model(composed: Composed, found: ModelConfig) -> ModelConfig:
    model: ModelConfig = composed.config.model
    given = [key for key in composed.given if key.partition(".")[0] == "model" or key.startswith("model/")]
    named = [key for key in given if key == "model" or "/" in key]
    if named:
        problems = [
            f"`{key}` must be {theirs!r}, as in init_from={composed.config.init_from}, but is {ours!r} instead. Leave out {', '.join(named)}."
            for key, ours, theirs in _differences(plain(model), plain(found))
        ]
        if problems:
            raise ConfigError(*problems)
        return model
    if other := [key for key in given if key not in _DROPOUTS]:
        raise ConfigError(*(f"`{key}` must not be given with init_from: the architecture comes with the weights." for key in other))
    for key in given:
        found = _with(found, key.split(".")[1:], _value(model, key))
    return found


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "model") -> list[tuple[str, Any, Any]]:
    made: list[tuple[str, Any, Any]] = []
    for name in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(name), theirs.get(name)
        if name in _FREE or a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            made += _differences(a, b, f"{prefix}.{name}")
        else:
            made.append((f"{prefix}.{name}", a, b))
    return made


def _value(model: ModelConfig, key: str) -> Any:
    value: Any = model
    for name in key.split(".")[1:]:
        value = getattr(value, name)
    return value


def _with(config: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return dc.replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})

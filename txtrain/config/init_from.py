"""`init_from`: architecture and tokenizer of the model that a run starts from. No torch."""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path
from typing import Any

from txtrain.config.composed import Composed
from txtrain.errors import ConfigError
from txtrain.ground.convert import differing, marked, plain
from txtrain.model.config import ModelConfig


def applied(composed: Composed, model: ModelConfig, tokenizer: Path | None) -> Composed:
    """The configuration with the model of its init_from, and the folder of its tokenizer.

    Raises:
        ConfigError: `model=` contradicts it, or it has no tokenizer and none is given.
    """
    config = composed.config
    changes: dict[str, Any] = {"model": _model(composed, model)}
    if "data.tokenizer" not in composed.given and config.data.tokenizer == "train":
        if tokenizer is None:
            raise ConfigError(f"`data.tokenizer` must be given with init_from={config.init_from}: it has no tokenizer.")
        changes["data"] = dc.replace(config.data, tokenizer=str(tokenizer))
    config = dc.replace(config, **changes)
    if problems := list(config.check()):
        raise ConfigError(*problems)
    return dc.replace(composed, config=config, grafts={})


def _model(composed: Composed, found: ModelConfig) -> ModelConfig:
    model: ModelConfig = composed.config.model
    given = [key for key in composed.given if key.partition(".")[0] == "model" or key.startswith("model/")]
    named = [key for key in given if key == "model" or "/" in key]
    affects = marked(ModelConfig, "affects")
    if named:  # labels, token ids, dropout and initial values may differ from those of the weights
        free = [key for key, what in affects.items() if what != "training"]
        where, leave = f"init_from={composed.config.init_from}", f"Leave out {', '.join(named)}."
        problems = [
            f"`model.{key}` must be {theirs!r}, as in {where}, but is {ours!r} instead. {leave}"
            for key, theirs, ours in differing(plain(found), plain(model), free)
        ]
        if problems:
            raise ConfigError(*problems)
        return model
    if other := [key for key in given if affects.get(key.removeprefix("model.")) != "dropout"]:
        raise ConfigError(
            *(f"`{key}` must not be given with init_from: the architecture comes with the weights." for key in other)
        )
    for key in given:
        found = _with(found, key.split(".")[1:], _value(model, key))
    return found


def _value(model: ModelConfig, key: str) -> Any:
    value: Any = model
    for name in key.split(".")[1:]:
        value = getattr(value, name)
    return value


def _with(config: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return dc.replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})

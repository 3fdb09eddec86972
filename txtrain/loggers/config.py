"""The words of the loggers that come along, and `logger.KEY=` for whichever of them has the key. No torch.

The configuration holds loggers by name (`logger.wandb.project`), so that there may be several. Almost always there is one, and
people write WandbLogger's own words: `logger.project=mine`.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from txtrain.errors import ConfigError, nearest
from txtrain.places import options
from txtrain.typed import key_of, part

WANDB, TENSORBOARD = "txtrain.loggers.wandb.WandbLogger", "lightning.pytorch.loggers.TensorBoardLogger"


@dc.dataclass(frozen=True, kw_only=True)
class Wandb:
    """WandbLogger's words and wandb.init's. A WANDB_* variable of the same meaning wins."""

    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    job_type: str | None = None
    notes: str | None = None
    name: str | None = None  # null: the run's name and folder
    id: str | None = None  # null: kept in run.json
    mode: Literal["online", "offline", "disabled"] | None = None
    offline: bool = False
    save_dir: str | None = None  # null: the run's folder
    save_code: bool | None = None
    log_model: bool | Literal["all"] = False  # checkpoints as artifacts: true: the last one; all: each
    checkpoint_name: str | None = None  # of the artifact; null: model-<id>
    settings: dict[str, Any] | None = None  # of wandb.Settings
    x_axis: Literal["step", "tokens"] = "step"  # of the charts


@dc.dataclass(frozen=True, kw_only=True)
class TensorBoard:
    """TensorBoardLogger's words and SummaryWriter's."""

    name: str | None = None
    version: str | int | None = None
    sub_dir: str | None = None
    save_dir: str | None = None  # null: the run's folder
    default_hp_metric: bool = True
    comment: str | None = None
    max_queue: int | None = None
    flush_secs: int | None = None
    filename_suffix: str | None = None
    x_axis: Literal["step", "tokens"] = "step"


_WORDS: dict[str, type] = {WANDB: Wandb, TENSORBOARD: TensorBoard, "lightning.pytorch.loggers.WandbLogger": Wandb}


def settled(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The loggers by name, each with those of the common words that it has.

    Raises:
        ConfigError: a word that none of them has, a value of the wrong type, or words for a logger that is not there.
    """
    loggers = {name: dict(node) for name, node in raw.items() if _is_logger(node)}
    problems: list[str] = []
    for key, value in raw.items():
        if key not in loggers:
            problems += _given(loggers, key, value)
    for name, node in loggers.items():
        if node["_target_"] in _WORDS:
            given = {key: value for key, value in node.items() if key != "_target_"}
            problems += part(_WORDS[node["_target_"]], given, f"logger.{name}")[1]
    if problems:
        raise ConfigError(*problems)
    return loggers


def _is_logger(node: Any) -> bool:
    return isinstance(node, Mapping) and "_target_" in node


def _given(loggers: dict[str, dict[str, Any]], key: str, value: Any) -> Iterator[str]:
    """Hand the word to the loggers that have it; what is wrong with it."""
    if isinstance(value, Mapping) and key in options("logger"):
        inner = next(iter(value), "KEY")
        have = f"logger=[{','.join([*loggers, key])}]" if loggers else f"logger={key}"
        yield f"`logger.{key}.{inner}`: the run has no logger {key}. Write {have}."
        return
    shown = f"`logger.{key}={value}`"
    if not loggers:
        yield f"{shown}: the run has no logger to give it to. Write logger=wandb, or logger=tensorboard."
        return
    words = {name: _words(node) for name, node in loggers.items()}
    takers = [name for name, known in words.items() if key in known]
    for name in takers:
        loggers[name][key] = value
    if not takers:
        known = list(dict.fromkeys(word for each in words.values() for word in each))
        near = nearest(key, known)
        guess = f" Did you mean logger.{near}?" if near else f" {'It has' if len(loggers) == 1 else 'They have'}: {', '.join(known)}." if known else ""
        yield f"{shown}: {' and '.join(loggers)} {'has' if len(loggers) == 1 else 'have'} no key {key}.{guess}"


def _words(node: Mapping[str, Any]) -> list[str]:
    """Of a logger of the user's own only those that its file gives."""
    known = _WORDS.get(node["_target_"])
    return [key_of(f) for f in dc.fields(known)] if known else [key for key in node if key != "_target_"]

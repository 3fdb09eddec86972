"""The keys of the packaged loggers, and `logger.KEY=` for whichever logger has the key. No torch.

The configuration holds loggers by name (`logger.wandb.project`), since there may be several. Usually there is one, and
`logger.project=mine` is enough.
"""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import yaml

from txtrain.config.paths import CONF, options
from txtrain.config.targets import WANDB
from txtrain.errors import ConfigError, nearest
from txtrain.ground.convert import key_of, part
from txtrain.registry import config, knob

TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"
_PLAIN_NAME = re.compile(r"(?!(?i:wandb)$)\w[\w.-]*")  # W&B's own folder may hold links that leave the run's


def _named_again(default: Any) -> Any:
    """A key that says where data or code is sent or written: never taken from an earlier run's file."""
    return knob(default, from_run=lambda value: False)


def _folder_name(default: Any) -> Any:
    """Part of a path in the run's folder: taken from an earlier run's file if it cannot leave that folder."""
    return knob(default, from_run=lambda value: _PLAIN_NAME.fullmatch(str(value)))


@config
class Wandb:
    """Keys of WandbLogger and wandb.init. A WANDB_* environment variable of the same meaning wins."""

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
    save_dir: str | None = _named_again(None)  # null: the run's folder
    save_code: bool | None = _named_again(None)
    log_model: bool | Literal["all"] = False  # checkpoints as artifacts: true: the last one; all: each
    checkpoint_name: str | None = None  # of the artifact; null: model-<id>
    settings: dict[str, Any] | None = _named_again(None)  # of wandb.Settings
    x_axis: Literal["step", "tokens"] = "step"  # of the charts


@config
class TensorBoard:
    """Keys of TensorBoardLogger and SummaryWriter."""

    name: str | None = _folder_name(None)
    version: str | int | None = _folder_name(None)
    sub_dir: str | None = _folder_name(None)
    save_dir: str | None = _named_again(None)  # null: the run's folder
    default_hp_metric: bool = True
    comment: str | None = None
    max_queue: int | None = None
    flush_secs: int | None = None
    filename_suffix: str | None = _folder_name(None)
    x_axis: Literal["step", "tokens"] = "step"


_WORDS: dict[str, type] = {WANDB: Wandb, TENSORBOARD: TensorBoard, "lightning.pytorch.loggers.WandbLogger": Wandb}


def settled(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The loggers by name; each `logger.KEY=` is moved into those that have the key.

    Raises:
        ConfigError: a key that no logger has, a value of the wrong type, or keys of a logger that the run has not.
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


def resumed(saved: Any, given: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The loggers of a resumed run: the packaged options of the saved names, with the saved plain values.

    The run's folder may be a stranger's and loggers use the user's API keys: no class, host or path is taken from it.

    Args:
        saved: `logger` of the run's config.yaml.
        given: keys of the command line, such as logger.wandb.project, which win.

    Returns:
        The loggers, and problems: what must be given again.
    """
    made: dict[str, Any] = {}
    problems: list[str] = []
    for name, node in (saved if isinstance(saved, Mapping) else {}).items():
        if f"logger.{name}._target_" in given:
            continue
        packaged = _packaged(str(name))
        if not _is_logger(node) or node["_target_"] != packaged.get("_target_"):
            what = f"is {node['_target_']!r}" if _is_logger(node) else "names no class"
            problems.append(
                f"`logger.{name}` {what} in the run's config.yaml, and a class that a file names is never built. "
                f"Name it again: logger={name} from your --config-dir, or leave it out: logger=none."
            )
            continue
        words = {key_of(f): f.metadata.get("from_run") for f in dc.fields(_WORDS[packaged["_target_"]])}
        made[name] = dict(packaged)
        for key, value in node.items():
            taken = words.get(key)
            if any(f"{g}.".startswith((f"logger.{name}.{key}.", f"logger.{key}.")) for g in given):
                continue
            if taken is None or value == packaged.get(key) or taken(value):
                made[name][key] = value
            else:
                problems.append(
                    f"`logger.{name}.{key}` must be named again, since a run's file may not say where data are sent or "
                    f"written. It was {value!r}: give logger.{name}.{key}=... or logger.{name}.{key}=null."
                )
    return made, problems


def _packaged(name: str) -> dict[str, Any]:
    """The node of that name in conf/logger/; empty if there is none."""
    if name not in options("logger"):
        return {}
    node: dict[str, Any] = yaml.safe_load((CONF / "logger" / f"{name}.yaml").read_text(encoding="utf-8")).get(name, {})
    return node


def _is_logger(node: Any) -> bool:
    return isinstance(node, Mapping) and "_target_" in node


def _given(loggers: dict[str, dict[str, Any]], key: str, value: Any) -> Iterator[str]:
    """Set the key in the loggers that have it; yields problems."""
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
        guess = (
            f" Did you mean logger.{near}?" if near
            else f" {'It has' if len(loggers) == 1 else 'They have'}: {', '.join(known)}." if known else ""
        )
        yield f"{shown}: {' and '.join(loggers)} {'has' if len(loggers) == 1 else 'have'} no key {key}.{guess}"


def _words(node: Mapping[str, Any]) -> list[str]:
    """The keys of a logger; for a user's own, those in its file."""
    known = _WORDS.get(node["_target_"])
    return [key_of(f) for f in dc.fields(known)] if known else [key for key in node if key != "_target_"]

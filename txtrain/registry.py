"""The table of options: of each axis and name a config class and a lazy reference to what is built from it. No torch.

Every choice that a user can make by name is a row of `TABLE`. The config is a frozen dataclass in a module without torch; the
class that does the work is named as "module:Class" and imported when it is first built.
"""

from __future__ import annotations

import dataclasses as dc
import importlib
import inspect
from typing import Any, NamedTuple


class Option(NamedTuple):
    config: type  # frozen dataclass; its `type` field is the option's name
    target: str | type  # "module:Class", or the class itself where a user registered it


TABLE: dict[str, dict[str, Option]] = {}

# Where an axis is chosen on the command line. Axes of the model are groups below model/; all others are groups of their own name.
MODEL_AXES = ("attention", "ffn", "position", "norm", "embedding", "head")
GROUP = {axis: f"model/{axis}" for axis in MODEL_AXES}

# norm_position is a plain value (model.norm_position=post): its options have no knobs.
VALUE_AXES = {"norm_position": "model.norm_position"}

USER_AXES = ("attention", "ffn", "position", "norm", "norm_position", "objective", "data", "optimizer", "scheduler")


def group_of(axis: str) -> str:
    return GROUP.get(axis, axis)


def register(axis: str, names: str, target: str | type, config: type) -> None:
    for name in names.split():
        TABLE.setdefault(axis, {})[name] = Option(config, target)


def resolve(axis: str, name: str) -> Any:
    """The class behind an option; imports its module."""
    target = TABLE[axis][name].target
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(module), attribute)
    return target


def make(axis: str, config: Any, **given: Any) -> Any:
    """What an option stands for, called with its knobs and with what the caller gives, each where its parameters name it."""
    target = resolve(axis, config.type)
    values = {f.name: getattr(config, f.name) for f in dc.fields(config)} | given
    return target(**{name: values[name] for name in inspect.signature(target).parameters if name in values})


def knob(default: Any, *, carry: bool = False) -> Any:
    """A field of a config. carry: not part of the mechanism, so that a swap to another option that also has it keeps its value."""
    return dc.field(default=default, metadata={"carry": carry})


def axis(name: str) -> Any:
    """A field whose value is the config of one option of that axis, told apart by its `type`."""
    return dc.field(metadata={"axis": name})


def axes(name: str) -> Any:
    """A field whose value is a mapping from names of the user's to configs of options of that axis."""
    return dc.field(metadata={"axes": name})


def choice(name: str, default: Any = dc.MISSING) -> Any:
    """A string field whose value is the name of one option of that axis."""
    return dc.field(default=default, metadata={"choice": name})


# What each axis' config derives from; filled by the modules that own the axes.
BASES: dict[str, type] = {}

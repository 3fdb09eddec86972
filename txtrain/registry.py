"""component(axis, name): a config class and a lazy reference to what is built from it. No torch.

Every choice that a user can make by name is a row of `TABLE`. The config is a frozen dataclass in a module without torch; the
class that does the work is named as "module:Class" and imported when it is first built.
"""

from __future__ import annotations

import dataclasses as dc
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, get_type_hints

T = TypeVar("T", bound=type)


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
    return imported(target) if isinstance(target, str) else target


def imported(reference: str) -> Any:
    """What "module:name" stands for."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


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


def component(axis: str, name: str) -> Callable[[T], T]:
    """Register your own option on an axis: `@txtrain.component("ffn", "mine")`, then `model/ffn=mine`.

    The knobs are the class's nested frozen dataclass `Config` if it has one; otherwise they are read off the constructor: every
    parameter with a default and a type becomes a key, and parameters without a default (`dim`, `n_heads`, ...) are given by the
    model's own values. No YAML file is needed; one in your `--config-dir` under the same name may set other defaults.

    Raises:
        ConfigError: the axis does not exist.
    """
    from txtrain.errors import ConfigError, hint

    if axis not in USER_AXES:
        raise ConfigError(f"`txtrain.component({axis!r}, {name!r})`: the axis must be one of {', '.join(USER_AXES)}.{hint(axis, USER_AXES)}")

    def wrap(cls: T) -> T:
        import txtrain.config.schema  # noqa: F401  (fills BASES)

        own = vars(cls).get("Config")
        config = _config_from_constructor(axis, cls) if own is None else _config_with_base(axis, own)
        register(axis, name, cls, config)
        if axis not in VALUE_AXES:
            from hydra.core.config_store import ConfigStore

            ConfigStore.instance().store(name=name, node={"type": name}, group=group_of(axis))
        return cls

    return wrap


def _config_with_base(axis: str, own: type) -> type:
    """A nested Config need not derive from the axis' base: its fields are joined to it."""
    from txtrain.errors import ConfigError

    base = BASES[axis]
    if issubclass(own, base):
        return own
    try:
        return dc.make_dataclass(own.__qualname__, [], bases=(own, base), frozen=True, kw_only=True, namespace={"__module__": own.__module__})
    except TypeError as e:
        raise ConfigError(f"`{own.__qualname__}` must be @dataclass(frozen=True, kw_only=True) to describe an option of {axis}: {e}.") from e


def _config_from_constructor(axis: str, cls: type) -> type:
    base = BASES[axis]
    inherited = {f.name for f in dc.fields(base)}
    try:
        hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    except Exception:  # a hint that cannot be evaluated here leaves its knob untyped
        hints = {}
    fields: list[Any] = []
    for p in list(inspect.signature(cls).parameters.values()):
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.default is p.empty or p.name in inherited:
            continue
        default = tuple(p.default) if isinstance(p.default, list) else p.default
        fields.append((p.name, hints.get(p.name, Any), knob(default, carry=p.name in ("bias", "dropout"))))  # these are no option's mechanism
    return dc.make_dataclass(f"{cls.__name__}Config", fields, bases=(base,), frozen=True, kw_only=True, namespace={"__module__": cls.__module__})

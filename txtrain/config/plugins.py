"""`@txtrain.component(axis, name)`: options of the user's own, which Hydra and the registry then know."""

from __future__ import annotations

import dataclasses as dc
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

import txtrain.config.schema  # noqa: F401  (fills BASES)
from txtrain.errors import ConfigError, hint
from txtrain.registry import BASES, USER_AXES, VALUE_AXES, group_of, knob, register

T = TypeVar("T", bound=type)


def component(axis: str, name: str) -> Callable[[T], T]:
    """Register your own option on an axis: `@txtrain.component("ffn", "mine")`, then `model/ffn=mine`.

    The knobs are the class's nested frozen dataclass `Config` if it has one; otherwise they are read off the constructor: every
    parameter with a default and a type becomes a key, and parameters without a default (`dim`, `n_heads`, ...) are given by the
    model's own values. No YAML file is needed; one in your `--config-dir` under the same name may set other defaults.

    Raises:
        ConfigError: the axis does not exist.
    """
    if axis not in USER_AXES:
        raise ConfigError(f"`txtrain.component({axis!r}, {name!r})`: the axis must be one of {', '.join(USER_AXES)}.{hint(axis, USER_AXES)}")

    def wrap(cls: T) -> T:
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

"""`@txtrain.component(axis, name)`: a user's own options, registered for Hydra and the registry."""

from __future__ import annotations

import dataclasses as dc
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast, get_type_hints

import txtrain.config.schema  # noqa: F401  (fills BASES)
from txtrain.errors import ConfigError, hint
from txtrain.registry import (
    BASES,
    FUNCTION_AXES,
    METRIC,
    USER_AXES,
    VALUE_AXES,
    config,
    dropout_knob,
    inherits_from_package,
    knob,
    register,
)

T = TypeVar("T", bound=Callable[..., Any])  # a class; of a reward also a function, of a metric always


@config
class MetricConfig:
    """A metric of the user's own."""

    type: str


def component(axis: str, name: str) -> Callable[[T], T]:
    """Register your own option on an axis: `@txtrain.component("ffn", "mine")`, then `model/ffn=mine`.

    Its keys are the fields of the class's nested frozen dataclass `Config` if it has one. Else they are read from the
    constructor: every parameter with a default and a type becomes a key, and parameters without a default (`dim`,
    `n_heads`, ...) get the model's values. No YAML file is needed; one of that name in your `--config-dir` may set
    other defaults.

    On the axis "metric" it is a function: `f(model, batch)` returns a number for each sample of the batch, [B], or two:
    their sum and count, [B] each. `metrics=[NAME]` adds its mean to validation and to `evaluate`.

    Raises:
        ConfigError: the axis does not exist, or a key is not allowed.
    """
    if axis not in (*USER_AXES, METRIC):
        raise ConfigError(
            f"`txtrain.component({axis!r}, {name!r})`: the axis must be one of "
            f"{', '.join((*USER_AXES, METRIC))}.{hint(axis, USER_AXES)}"
        )

    def wrap(given: T) -> T:
        cls = cast(type, given)
        if axis == METRIC:
            register(axis, name, cls, MetricConfig)
            return given
        if axis in FUNCTION_AXES and inspect.isfunction(given):  # it has no keys
            register(axis, name, cls, BASES[axis])
            return given
        own = vars(cls).get("Config")
        config = _config_from_constructor(axis, cls) if own is None else _config_with_base(axis, own)
        if problem := _knob_problem(axis, config):
            raise ConfigError(f"`txtrain.component({axis!r}, {name!r})`: {problem}")
        register(axis, name, cls, config)
        return given

    return wrap


def _knob_problem(axis: str, config: type) -> str | None:
    inherited = {f.name for f in dc.fields(BASES[axis])}
    for f in dc.fields(config):
        if f.name not in inherited and not _is_free(BASES[axis], f.name):
            return f"a knob must have another name than {f.name!r}, which every {axis} has a method or a constant of."
        if axis in VALUE_AXES and f.name != "type" and f.default is f.default_factory is dc.MISSING:
            return f"{f.name!r} must have a default: an option of {axis} is chosen by its name alone."
    return None


def _is_free(base: type, name: str) -> bool:
    """Whether a field may have this name: `base` has none, or a plain default of it without an annotation."""
    owner = next((cls for cls in base.__mro__ if name in vars(cls)), None)
    plain = owner is None or isinstance(vars(owner)[name], int | float | str | None)
    return plain and (owner is None or name not in inspect.get_annotations(owner))


# Numbers of parameters: a user's own option is built and counted unless its Config has these methods.
COUNTED = ("n_params", "n_params_of", "n_active_params")


def _config_with_base(axis: str, own: type) -> type:
    """The nested Config joined with the axis' base, if it does not derive from it.

    One that derives from a packaged option does not inherit the methods that count that option's parameters.
    """
    base = BASES[axis]
    forms = [form for form in COUNTED if not _is_free(base, form) and inherits_from_package(own, form)]
    counted = {form: getattr(base, form) for form in forms}
    if issubclass(own, base) and all(getattr(own, form) is method for form, method in counted.items()):
        return own
    bases = (own,) if issubclass(own, base) else (own, base)
    namespace = counted | {"__module__": own.__module__}
    try:
        return dc.make_dataclass(own.__qualname__, [], bases=bases, frozen=True, kw_only=True, namespace=namespace)
    except TypeError as e:
        raise ConfigError(
            f"`{own.__qualname__}` must be @dataclass(frozen=True, kw_only=True) to describe an option of {axis}: {e}."
        ) from e


def _config_from_constructor(axis: str, cls: type) -> type:
    base = BASES[axis]
    inherited = {f.name for f in dc.fields(base)}
    try:
        hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    except Exception:  # a hint that cannot be evaluated here: the keys stay untyped
        hints = {}
    fields: list[Any] = []
    for p in list(inspect.signature(cls).parameters.values()):
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.default is p.empty or p.name in inherited:
            continue
        default = tuple(p.default) if isinstance(p.default, list) else p.default
        made = dropout_knob(default) if p.name == "dropout" else knob(default, carry=p.name == "bias")
        fields.append((p.name, hints.get(p.name, Any), made))
    return dc.make_dataclass(
        f"{cls.__name__}Config", fields, bases=(base,), frozen=True, kw_only=True,
        namespace={"__module__": cls.__module__}
    )

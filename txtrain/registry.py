"""The table of options: for each axis and name a config class and a lazy reference to what is built from it. No torch.

Every choice that a user can make by name is a row of `TABLE`. The config is a frozen dataclass in a module without
torch; the class that does the work is named as "module:Class" and imported when it is first built.
"""

from __future__ import annotations

import dataclasses as dc
import importlib
import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType, NoneType
from typing import Any, Literal, NamedTuple, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

T = TypeVar("T")

# How ranks share a component's parameters. What is not named is whole on every rank.
#     rows           a matrix by its outputs
#     shared_rows    the same; with more ranks than key-value heads whole on each rank, which reads one head's rows
#     columns        a matrix by its inputs: its outputs are summed over the ranks
#     heads          a table with a column for each head, where attention is cut
#     vocabulary     a table by tokens
#     equal_part     a number of which each rank counts an equal part
#     experts        stacked experts, whole ones for each rank of `strategy.ep_size`
How = Literal["rows", "shared_rows", "columns", "heads", "vocabulary", "equal_part", "experts"]
Cut = Mapping[str, How]  # by the names of modules, parameters and numbers within a component
WHOLE: Cut = MappingProxyType({})
NONE: Mapping[str, str] = MappingProxyType({})


class Option(NamedTuple):
    config: type[Any]  # frozen dataclass; its `type` field is the option's name
    target: str | type  # "module:Class", or the class itself where a user registered it
    cut: Cut = WHOLE
    absent: Mapping[str, str] = NONE  # of keys of other options of the axis: why this one lacks it, after a space


TABLE: dict[str, dict[str, Option]] = {}

# Where an axis is chosen on the command line: axes of the model in groups below model/, others in groups of their name.
MODEL_AXES = ("attention", "ffn", "position", "norm", "embedding", "head")
GROUP = {axis: f"model/{axis}" for axis in MODEL_AXES}

# norm_position is a plain value (model.norm_position=post): its options have no knobs.
VALUE_AXES = {"norm_position": "model.norm_position"}

METRIC = "metric"  # the axis of users' metrics, which are functions
USER_AXES = (
    "attention", "ffn", "position", "norm", "norm_position", "objective", "data", "optimizer", "scheduler", "reward",
)
FUNCTION_AXES = ("reward",)  # where a user's option may also be a function, called as it is


def group_of(axis: str) -> str:
    return GROUP.get(axis, axis)


def register(
    axis: str, names: str, target: str | type, config: type, cut: Cut = WHOLE, absent: Mapping[str, str] = NONE
) -> None:
    for name in names.split():
        TABLE.setdefault(axis, {})[name] = Option(config, target, cut, absent)


def cut_of(axis: str, config: Any) -> Cut:
    """How ranks share the parameters of an option's component."""
    return TABLE[axis][config.type].cut


def chosen(axis: str, config: Any) -> str:
    """The choice of an option, as written on the command line."""
    return f"{VALUE_AXES.get(axis) or group_of(axis)}={config.type}"


def is_own(axis: str, config: Any) -> bool:
    """Whether the option is the user's own."""
    target = TABLE[axis][config.type].target
    return not _is_of_package(target.partition(":")[0] if isinstance(target, str) else target.__module__)


def unstated(axis: str, config: Any, *forms: str) -> str:
    """The methods that a user's own option should define in its Config and does not.

    Those inherited from an option of the package do not count: they describe another module.
    """
    missing = [form for form in forms if is_own(axis, config) and inherits_from_package(type(config), form)]
    return ", ".join(f"`{form}`" for form in missing)


def inherits_from_package(config: type, form: str) -> bool:
    owner = next((cls for cls in config.__mro__ if form in vars(cls)), None)
    return owner is None or _is_of_package(owner.__module__)


def _is_of_package(module: str) -> bool:
    return module.partition(".")[0] == __name__.partition(".")[0]


def resolve(axis: str, name: str) -> Any:
    """The class behind an option; imports its module."""
    target = TABLE[axis][name].target
    return imported(target) if isinstance(target, str) else target


def imported(reference: str) -> Any:
    """The object that "module:name" refers to."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def make(axis: str, config: Any, **given: Any) -> Any:
    """Call an option's target with its knobs and with what the caller gives, as far as its parameters name them."""
    return call(axis, config, {f.name: getattr(config, f.name) for f in dc.fields(config)} | given)


@lru_cache  # asked for once a block
def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(target).parameters


def call(axis: str, config: Any, values: Mapping[str, Any], knobs: Collection[str] = ()) -> Any:
    """Call an option's target with those of the values that its parameters name.

    Args:
        knobs: names of values that it must accept, by name or through **kwargs.

    Raises:
        ConfigError: a parameter of a user's component has neither a value nor a default, or a knob has no parameter.
    """
    from txtrain.errors import ConfigError

    target = resolve(axis, config.type)
    parameters = _parameters(target)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {name: value for name, value in values.items() if name in parameters or (takes_any and name in knobs)}
    where = f"`{chosen(axis, config)}`: {target.__qualname__}.__init__"
    for name, p in parameters.items():
        if p.default is p.empty and name not in given and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise ConfigError(f"{where} must give its parameter {name!r} a default: no key has that name.")
    for name in knobs:
        if name not in given:
            raise ConfigError(f"{where} must have a parameter {name!r}, which is a knob of its Config.")
    return target(**given)


def knob(
    default: Any = dc.MISSING,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    carry: bool = False,
    affects: Literal["label", "init", "dropout", "ids", "training"] | None = None,
    free: bool = False,
    literal: bool = False,
    run: bool = False,
    from_run: Callable[[Any], object] | None = None,
    was: str | None = None,
    unit: bool = False,
) -> Any:
    """A field of a config, with its properties.

    Args:
        at_least, above, at_most, below: bounds of the number, or of each number in a list; null and strings pass.
        carry: not part of the mechanism, so that a swap to another option that has it keeps its value.
        affects: what of a model it changes, where that is neither weights nor logits: nothing (a label), how weights
            start, dropout, the ids of special tokens, or something else of training.
        free: may differ on resume: changes neither the samples of a step nor what is done with them.
        literal: its value on the command line is taken as typed.
        run: names a run or something in one; a folder of runs means the newest.
        from_run: whether to take a value from the config.yaml of an earlier run, perhaps a stranger's; None: always.
        was: its name in configurations of earlier versions, which is read too.
        unit: a text with a unit; a number alone is read as that text, so that the config's `check` says what it lacks.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    marks = {
        "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
        "carry": carry,
        "affects": affects,
        "free": free,
        "literal": literal,
        "run": run,
        "from_run": from_run,
        "was": was,
        "unit": unit,
    }
    return dc.field(default=default, metadata={name: mark for name, mark in marks.items() if mark})


def dropout_knob(default: Any = 0.0) -> Any:
    """The probability that a value is dropped in training."""
    return knob(default, at_least=0, below=1, carry=True, affects="dropout")


def axis(name: str, default: Any = dc.MISSING, *, free: bool = False) -> Any:
    """A field that holds the config of one option of an axis, distinguished by its `type`. free: as in `knob`."""
    return dc.field(default=default, metadata={"axis": name, "free": free})


def axes(name: str) -> Any:
    """A field that maps the user's names to configs of options of an axis; empty if not given."""
    return dc.field(default_factory=dict, metadata={"axes": name})


def choice(name: str, default: Any = dc.MISSING) -> Any:
    """A string field that holds the name of an option of an axis."""
    return dc.field(default=default, metadata={"choice": name})


# ------------------------------------------------------------------------------------------------------ their classes


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dc.field,))
def config(cls: type[T]) -> type[T]:
    """A frozen dataclass of keys, which are given by name.

    `dataclass` compiles the methods of each class: a quarter of the time of `txtrain plan`. These classes share theirs.
    """
    assert "__post_init__" not in dir(cls)  # nobody would call it
    cls.__doc__ = cls.__doc__ or cls.__name__  # else `dataclass` writes a signature there, which takes as long
    for name, method in _SHARED.items():
        if name not in vars(cls):
            setattr(cls, name, method)
    return dc.dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)(cls)


def _init(self: Any, **given: Any) -> None:
    values, name = {}, f"{type(self).__qualname__}.__init__()"
    for f in _fields(self):
        if f.name in given:
            values[f.name] = given.pop(f.name)
        elif f.default is not dc.MISSING:
            values[f.name] = f.default
        elif f.default_factory is not dc.MISSING:
            values[f.name] = f.default_factory()
        else:
            raise TypeError(f"{name} missing 1 required keyword-only argument: {f.name!r}")
    for key in given:
        raise TypeError(f"{name} got an unexpected keyword argument {key!r}")
    vars(self).update(values)


def _repr(self: Any) -> str:
    shown = (f"{f.name}={getattr(self, f.name)!r}" for f in _fields(self))
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _eq(self: Any, other: object) -> Any:
    return _values_of(self) == _values_of(other) if type(self) is type(other) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values_of(self))


_SHARED = {"__init__": _init, "__repr__": _repr, "__eq__": _eq, "__hash__": _hash}


def _values_of(config: Any) -> tuple[Any, ...]:
    return tuple(getattr(config, f.name) for f in _fields(config))


def _fields(config: Any) -> tuple[dc.Field[Any], ...]:
    cls: type = type(config)
    return _fields_of(cls)


_fields_of = lru_cache(maxsize=None)(dc.fields)


def key_of(field: dc.Field[Any]) -> str:
    """The field's key on the command line, without the underscore after a Python keyword (`async_`)."""
    return field.name.removesuffix("_")


# ------------------------------------------------------------------------------------------------------------- bounds

_HOLDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def out_of_range(config: Any, path: str = "") -> Iterator[str]:
    """Numbers outside their fields' bounds, as sentences, in a config at `path` and the configs in it."""
    for f in dc.fields(config):
        bounds, key = f.metadata.get("bounds", {}), f"{path}.{key_of(f)}" if path else key_of(f)
        for at, value in _values(getattr(config, f.name), key):
            if dc.is_dataclass(value):
                yield from out_of_range(value, at)
            elif type(value) in (int, float) and not all(_HOLDS[name](value, n) for name, n in bounds.items()):
                hint = get_type_hints(type(config))[f.name]
                allowed = in_bounds(bounds, hint if at == key else _element(hint))
                yield f"`{at}` must be {allowed}, but is {value} instead."


def in_bounds(bounds: Mapping[str, float], hint: Any) -> str:
    """The allowed values of that type, in words: `at least 0 and below 1, or null`."""
    words = [" and ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items())]
    for member in (hint, *get_args(hint)):
        words += map(str, get_args(member)) if get_origin(member) is Literal else ["null"] if member is NoneType else []
    return (", or " if len(bounds) > 1 else " or ").join(words)


def _values(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """A field's values and their paths: each one of lists and mappings."""
    if isinstance(value, (list, tuple, Mapping)):
        for at, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _values(one, f"{path}.{at}" if isinstance(value, Mapping) else f"{path}[{at}]")
    else:
        yield path, value


def _element(hint: Any) -> Any:
    """The type of the values in a list."""
    return next((get_args(m)[0] for m in (hint, *get_args(hint)) if get_origin(m) in (list, tuple)), Any)


# The base class of each axis' configs; filled by the modules that own the axes.
BASES: dict[str, type] = {}

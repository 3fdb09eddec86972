"""The overrides of a command line, parsed once: literals quoted, sweeps split into jobs, groups and options checked."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Transformer, ValueType
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from txtrain.config.literals import protect
from txtrain.config.paths import DATA, groups_of
from txtrain.config.schema import Train
from txtrain.config.schema_of_trained import OnTrained
from txtrain.errors import ConfigError, denied, hint, nearest
from txtrain.ground.convert import key_paths
from txtrain.ground.unknown_keys import unknown_key
from txtrain.registry import TABLE

LAUNCHER = "hydra/launcher"  # the group of what runs the members of a sweep
_ALIASES = {"recipe": "recipes", "experiment": "recipes"}
_LISTS = {"reward": "reward.use"}  # keys of a list that are also the parent of further keys
_SEVERAL = {"logger", "callbacks"}  # groups that take a list of options


@contextmanager
def hydra_errors() -> Iterator[None]:
    """Turn errors of Hydra, OmegaConf and YAML into ConfigError. Hydra raises ValueError for a few."""
    try:
        yield
    except ConfigError:
        raise
    except OverrideParseException as e:
        key, _, value = str(e.override).partition("=")
        if not key.isascii():  # no key of ours
            parent = key.rpartition(".")[0]
            beside = [name for up, _, name in (known.rpartition(".") for known in key_paths(Train)) if up == parent]
            raise ConfigError(unknown_key(key, value, beside, (), None)) from e
        wrong = f"`{key}` must be a value of Hydra's grammar, but is {value!r} instead."
        raise ConfigError(f"{wrong} Quote it: '{key}={_in_quotes(value)}'.") from e
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as e:
        raise ConfigError(_said(e)) from e


def _in_quotes(value: str) -> str:
    """Of a list its members: a list in quotes is none."""
    if not (value.startswith("[") and value.endswith("]")):
        return f'"{value}"'
    members = [member.strip() for member in value[1:-1].split(",")]
    return "[" + ",".join(m if m.startswith(("'", '"')) else _in_quotes(m) for m in members) + "]"


def _said(e: BaseException) -> str:
    if getattr(e, "full_key", None) and getattr(e, "msg", None):
        return f"`{e.full_key}`: {str(e.msg).splitlines()[0]}."  # type: ignore[attr-defined]
    if isinstance(e, yaml.MarkedYAMLError) and e.problem_mark is not None:
        return f"{e.problem_mark.name}, line {e.problem_mark.line + 1}: not valid YAML: {e.problem}."
    if isinstance(e, PermissionError) and e.filename is not None:
        return denied(e)
    while e.__cause__ is not None and not str(e):
        e = e.__cause__
    said = str(e).partition("Config search path")[0]
    return "; ".join(line.strip() for line in said.splitlines() if line.strip())[:300]


def parse(overrides: Iterable[str | Override], loader: ConfigLoaderImpl | None = None) -> list[Override]:
    """Parse by Hydra's grammar; what is parsed already stays. loader: has the options that `glob(*)` stands for."""
    parser = OverridesParser.create(config_loader=loader)
    return [o if isinstance(o, Override) else parser.parse_overrides([o])[0] for o in overrides]


def expand(overrides: Iterable[str], sweep: bool, loader: ConfigLoaderImpl | None = None) -> list[list[Override]]:
    """The overrides of each job; one job unless it is a sweep.

    Raises:
        ConfigError: something is not KEY=VALUE, cannot be read, or has several values without -m.
    """
    lines = [_normalised(o, sweep) for o in overrides]
    with hydra_errors():
        parsed = parse(lines, loader)
        if problems := [_needs_sweep(o) for o in parsed if o.is_sweep_override() and not sweep]:
            raise ConfigError(*problems)
        if not sweep:
            return [parsed]
        hydra = [o for o in parsed if o.is_hydra_override()]
        values = {o.get_key_element(): list(_values(o)) for o in parsed if not o.is_hydra_override()}
        if empty := [o for o in parsed if not values.get(o.get_key_element(), True)]:
            raise ConfigError(*(f"`{o.input_line}` must be at least one value, but stands for none." for o in empty))
        return [[*hydra, *job] for job in product(*values.values())]


def _values(o: Override) -> Iterator[Override]:
    """One override for each value of a sweep."""
    if not o.is_sweep_override():
        yield o
        return
    if not o.is_discrete_sweep():
        raise ConfigError(f"`{o.input_line}` must be values that can be counted: a,b, range(...) or glob(...).")
    for value in o.sweep_iterator():
        line = f"{o.get_key_element()}={Transformer.str(value)}"
        yield dc.replace(o, value_type=ValueType.ELEMENT, _value=value, input_line=line)


def _normalised(override: str, sweep: bool) -> str:
    if override.startswith("-"):
        raise ConfigError(f"`{override}` is not a flag. Overrides have no dashes: write {override.lstrip('-')}.")
    key, equals, value = override.partition("=")
    if not equals and not override.startswith("~"):
        raise ConfigError(f"`{override}` must be KEY=VALUE.")
    if key in _LISTS and not value.startswith("{"):
        key, value = _LISTS[key], f"[{value}]" if value.isidentifier() else value
    return protect(_ALIASES.get(key, key) + equals + value, sweep)


def _needs_sweep(o: Override) -> str:
    key, _, value = str(o.input_line).partition("=")
    is_group = {key, key.replace(".", "/")} & set(groups_of(Train))
    otherwise = "" if is_group else f"; '{key}=[{value}]' is a list, '{key}=\"{value}\"' a string"
    return f"`{key}` must be one value, but is {value!r} instead: -m runs each{otherwise}."


def check(overrides: Sequence[Override], loader: ConfigLoaderImpl, root: type) -> list[Override]:
    """The overrides to pass to Hydra.

    Values are passed as `++key=value`, which Hydra accepts for any key; `convert.build` refuses unknown ones, and
    suggests the nearest.

    Raises:
        ConfigError: no such option or group, a value given as a group, a group given as a value.
    """
    checker = _Checker(loader, root)
    checked = [checker.checked(o) for o in (*overrides, *_implied(overrides, root))]
    if checker.problems:
        raise ConfigError(*checker.problems)
    return checked


def _implied(overrides: Sequence[Override], root: type) -> list[Override]:
    """What the chosen source of data asks for, as far as nothing else is chosen (data=labels: a class head)."""
    if not issubclass(root, Train) or issubclass(root, OnTrained):  # a trained model has what it needs
        return []
    given = {o.key_or_group: o for o in overrides}
    chosen = given["data"].value() if "data" in given else None
    option = TABLE["data"].get(chosen) if isinstance(chosen, str) else None
    implied = {} if option is None else option.config.implies
    return parse([f"{key}={value}" for key, value in implied.items() if key not in given])


def _with_prefix(o: Override, prefix: str) -> Override:
    kind = OverrideType.FORCE_ADD if prefix else OverrideType.CHANGE
    return dc.replace(o, type=kind, input_line=prefix + str(o.input_line).lstrip("+"))


class _Checker:
    def __init__(self, loader: ConfigLoaderImpl, root: type) -> None:
        self.repository = loader.repository
        self.root, self.groups = root, groups_of(root)
        self.problems: list[str] = []

    def checked(self, o: Override) -> Override:
        key = o.key_or_group
        if key.startswith("hydra.launcher.") and not o.is_delete():
            return _with_prefix(o, "++")  # its keys are checked where they are read
        value: Any = o.value()
        if key == LAUNCHER and not o.is_delete():
            options = self.repository.get_group_options(LAUNCHER)
            if value not in options:
                meant = hint(value, options, f"{LAUNCHER}={{}}")
                self.problems.append(f"`{LAUNCHER}={value}` must be one of {', '.join(options)}.{meant}")
        if o.is_hydra_override() or o.is_delete():
            return o
        shown = value if isinstance(value, str) else o.get_value_string()
        dotted, slashed = key.replace("/", "."), key.replace(".", "/")
        if o.package is not None:
            self.problems.append(f"`{o.get_key_element()}`: packages (@) cannot be given here. Write {key}={shown}.")
        elif key in self.groups and not isinstance(value, dict):
            self.group(key, value, shown)
            return _with_prefix(o, "")
        elif slashed in self.groups and not isinstance(value, dict):
            self.group(slashed, value, shown, f"`{key}={shown}`: {slashed} is a group.")
        elif "/" in key and dotted in key_paths(self.root):
            self.problems.append(f"`{key}={shown}`: {dotted} is a value, not a group. Write {dotted}={shown}.")
        elif "/" in key:
            close = nearest(key, [*self.groups, *key_paths(self.root)])
            guess = f" Did you mean {close}={shown}?" if close else ""
            self.problems.append(
                f"`{key}={shown}`: there is no group {key}. Groups: {', '.join(self.groups) or 'none'}.{guess}"
            )
        # of another verb, or a folder beside recipes/
        elif not isinstance(value, dict) and self.repository.group_exists(key):
            beside = [f.name for f in dc.fields(self.root)]
            self.problems.append(unknown_key(key, shown, beside, key_paths(self.root), None))
        return _with_prefix(o, "++")

    def group(self, group: str, value: Any, shown: str, complaint: str = "") -> None:
        """Check the options chosen of a group. complaint: a problem that is known already."""
        options, name = self.repository.get_group_options(group), "recipe" if group == "recipes" else group
        listed = ", ".join(options) or "(there is none)"
        if isinstance(value, list) and group not in _SEVERAL:
            each = ",".join(map(str, value))
            self.problems.append(
                f"`{name}` must be one of {listed}, but is the list {shown} instead. To run each: -m {name}={each}."
            )
            return
        for v in value if isinstance(value, list) else [value]:
            exists = isinstance(v, str) and self.repository.config_exists(f"{group}/{v}")
            if complaint:
                write = f"Write {name}={v}." if exists else f"Write {name}=NAME, one of {listed}.{hint(v, options)}"
                self.problems.append(f"{complaint} {write}")
            elif not exists:
                script = DATA / group / f"{v}.sh"
                meant = hint(v, options, name + "={}")
                meant = f" {v} has several stages, each a run: bash {script}" if script.is_file() else meant
                self.problems.append(
                    f"`{name}={shown if not isinstance(value, list) else v}` must be one of {listed}.{meant}"
                )

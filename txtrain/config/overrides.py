"""The overrides of a command line: literals protected, sweeps split into jobs, groups and spellings checked, each before Hydra sees it."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from txtrain.config import slurm_launcher
from txtrain.config.literals import protect
from txtrain.config.schema import ROOTS
from txtrain.convert import key_paths
from txtrain.errors import ConfigError, hint, nearest
from txtrain.registry import TABLE, VALUE_AXES, group_of
from txtrain.unknown_keys import unknown_key

if TYPE_CHECKING:
    from txtrain.config.compose import Loader

_ALIASES = {"recipe": "recipes", "experiment": "recipes"}
_SEVERAL = {"logger", "callbacks"}  # groups that take a list of options


def groups_of(root: type) -> list[str]:
    """The groups of a verb, as written on its command line."""
    axes = [axis for axis in TABLE if axis not in VALUE_AXES and axis != "rope_scaling"]
    fields = {f.name for f in dc.fields(root)}
    groups = ["model", *map(group_of, axes), "trainer", *sorted(_SEVERAL)]
    return [g for g in groups if g.partition("/")[0] in fields] + (["recipes"] if "model" in fields else [])


@contextmanager
def hydra_errors() -> Iterator[None]:
    """Mistakes that only Hydra, OmegaConf or YAML see, as ours. Hydra says a few of them by ValueError."""
    try:
        yield
    except ConfigError:
        raise
    except OverrideParseException as e:
        key, _, value = str(e.override).partition("=")
        raise ConfigError(f"`{key}` must be a value of Hydra's grammar, but is {value!r} instead. Quote it: '{key}=\"{value}\"'.") from e
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as e:
        raise ConfigError(_said(e)) from e


def _said(e: BaseException) -> str:
    if getattr(e, "full_key", None) and getattr(e, "msg", None):
        return f"`{e.full_key}`: {str(e.msg).splitlines()[0]}."  # type: ignore[attr-defined]
    if isinstance(e, yaml.MarkedYAMLError) and e.problem_mark is not None:
        return f"{e.problem_mark.name}, line {e.problem_mark.line + 1}: not valid YAML: {e.problem}."
    while e.__cause__ is not None and not str(e):
        e = e.__cause__
    said = str(e).partition("Config search path")[0]
    return "; ".join(line.strip() for line in said.splitlines() if line.strip())[:300]


def parse(overrides: Sequence[str], loader: Loader | None = None) -> list[Override]:
    parsed: list[Override] = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    return parsed


def expand(overrides: Iterable[str], sweep: bool, loader: Loader | None = None) -> list[list[str]]:
    """The overrides of each job, in Hydra's spelling; one job unless it is a sweep.

    Raises:
        ConfigError: something is not KEY=VALUE, cannot be read, or has several values without -m.
    """
    lines = [_normalised(o, sweep) for o in overrides]
    with hydra_errors():
        parsed = parse(lines, loader)  # the loader is for glob(*)
        if problems := [_needs_sweep(o) for o in parsed if o.is_sweep_override() and not sweep]:
            raise ConfigError(*problems)
        if not sweep:
            return [lines]
        ours = [o for o in parsed if not o.is_hydra_override()]
        jobs = BasicSweeper.split_arguments(ours, None)[0]
        return [[str(o.input_line) for o in parsed if o.is_hydra_override()] + list(job) for job in jobs]


def _normalised(override: str, sweep: bool) -> str:
    if override.startswith("-"):
        raise ConfigError(f"`{override}` is not a flag. Overrides have no dashes: write {override.lstrip('-')}.")
    key, equals, value = override.partition("=")
    if not equals and not override.startswith("~"):
        verb = " The verb comes first." if override in ROOTS else ""
        raise ConfigError(f"`{override}` must be KEY=VALUE.{verb}")
    return protect(_ALIASES.get(key, key) + equals + value, sweep)


def _needs_sweep(o: Override) -> str:
    key, _, value = str(o.input_line).partition("=")
    otherwise = "" if {key, key.replace(".", "/")} & set(groups_of(ROOTS["train"])) else f"; '{key}=[{value}]' is a list, '{key}=\"{value}\"' a string"
    return f"`{key}` must be one value, but is {value!r} instead: -m runs each{otherwise}."


def check(overrides: Sequence[str], loader: Loader, root: type) -> list[str]:
    """The overrides as Hydra is to get them.

    Values are passed as `++key=value`, so that Hydra accepts them all: a key that does not exist reaches `convert.build`, which knows
    the near ones.

    Raises:
        ConfigError: an option or a group that does not exist, a value given like a group, a group given like a value.
    """
    checker = _Checker(loader, root)
    lines = [checker.line(o) for o in parse(overrides)]
    if checker.problems:
        raise ConfigError(*checker.problems)
    return lines


class _Checker:
    def __init__(self, loader: Loader, root: type) -> None:
        self.loader = loader
        self.root, self.groups, self.known = root, groups_of(root), key_paths(root)
        self.problems: list[str] = []

    def line(self, o: Override) -> str:
        key, line = o.key_or_group, str(o.input_line).lstrip("+")
        if key == slurm_launcher.GROUP and not o.is_delete():
            self.problems += slurm_launcher.check_name(str(o.value()), self.loader)
        if key.startswith("hydra.launcher.") and not o.is_delete():
            return f"++{line}"  # its keys are checked where they are read, by who knows the near ones
        if o.is_hydra_override() or o.is_delete():
            return str(o.input_line)
        value: Any = o.value()
        shown = value if isinstance(value, str) else line.partition("=")[2]
        dotted, slashed = key.replace("/", "."), key.replace(".", "/")
        if o.package is not None:
            self.problems.append(f"`{o.get_key_element()}`: packages (@) cannot be given here. Write {key}={shown}.")
        elif key in self.groups and not isinstance(value, dict):
            self.group(key, value, shown)
            return line
        elif slashed in self.groups and not isinstance(value, dict):
            self.group(slashed, value, shown, f"`{key}={shown}`: {slashed} is a group.")
        elif "/" in key and dotted in self.known:
            self.problems.append(f"`{key}={shown}`: {dotted} is a value, not a group. Write {dotted}={shown}.")
        elif "/" in key:
            near = nearest(key, [*self.groups, *self.known])
            guess = f" Did you mean {near}={shown}?" if near else ""
            self.problems.append(f"`{key}={shown}`: there is no group {key}. Groups: {', '.join(self.groups) or 'none'}.{guess}")
        elif not isinstance(value, dict) and self.loader.repository.group_exists(key):  # of another verb, or a folder beside recipes/
            self.problems.append(unknown_key(key, shown, [f.name for f in dc.fields(self.root)], self.known, None))
        return f"++{line}"

    def group(self, group: str, value: Any, shown: str, complaint: str = "") -> None:
        """`complaint`: what is wrong already, before the option is looked at."""
        options, name = self.loader.get_group_options(group), "recipe" if group == "recipes" else group
        listed = ", ".join(options) or "(there is none)"
        if isinstance(value, list) and group not in _SEVERAL:
            each = ",".join(map(str, value))
            self.problems.append(f"`{name}` must be one of {listed}, but is the list {shown} instead. To run each: -m {name}={each}.")
            return
        for v in value if isinstance(value, list) else [value]:
            exists = isinstance(v, str) and self.loader.repository.config_exists(f"{group}/{v}")  # recipes/bert/finetune too
            if complaint:
                write = f"Write {name}={v}." if exists else f"Write {name}=NAME, one of {listed}.{hint(v, options)}"
                self.problems.append(f"{complaint} {write}")
            elif not exists:
                self.problems.append(f"`{name}={shown if not isinstance(value, list) else v}` must be one of {listed}.{hint(v, options, name + '={}')}")

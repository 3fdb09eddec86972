"""Paths of the configuration files, in a checkout or an installed wheel; names of groups and options. No Hydra."""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path

from txtrain.registry import METRIC, TABLE, VALUE_AXES, group_of

_PACKAGE = Path(__file__).resolve().parents[1]
DATA = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent  # holds conf/ and recipes/
CONF = DATA / "conf"
_NO_GROUPS = {*VALUE_AXES, METRIC, "rope_scaling"}


def families() -> list[str]:
    """The names that `model=` accepts: families at laptop size, and published models."""
    return options("model")


def unwritten() -> list[tuple[str, str]]:
    """Group and name of the options without a YAML file, which would hold their `type` alone."""
    rows = [(group_of(axis), name) for axis in TABLE if axis not in _NO_GROUPS for name in TABLE[axis]]
    return [(group, name) for group, name in rows if not (CONF / group / f"{name}.yaml").is_file()]


def groups_of(root: type) -> list[str]:
    """The groups of a verb, as written on its command line."""
    axes = [axis for axis in TABLE if axis not in _NO_GROUPS]
    fields = {f.name for f in dc.fields(root)}
    groups = ["model", *map(group_of, axes), "trainer", "callbacks", "logger"]
    return [g for g in groups if g.partition("/")[0] in fields] + (["recipes"] if "model" in fields else [])


def options(group: str) -> list[str]:
    """Names of the packaged options of a group, such as model or model/attention; `recipes` too."""
    folder = DATA / group if group == "recipes" else CONF / group
    return sorted(
        f.relative_to(folder).with_suffix("").as_posix()
        for f in folder.glob("**/*.yaml" if group == "recipes" else "*.yaml")
    )

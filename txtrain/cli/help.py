"""`txtrain VERB --help`: options with the comments of their files, keys with those of their fields."""

from __future__ import annotations

import ast
import dataclasses as dc
import inspect
import itertools
import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from txtrain.cli.verbs import FLAGS, VERBS, root_of
from txtrain.config.paths import CONF, DATA, groups_of, options, unwritten
from txtrain.errors import ConfigError, hint
from txtrain.ground.convert import describe, hints, key_of, parts
from txtrain.ground.unknown_keys import meant_elsewhere
from txtrain.registry import TABLE, imported

LAUNCHER = "hydra/launcher"  # the group whose keys are Hydra's, not the verb's
_SLURM = "txtrain.config.slurm_launcher:SlurmConfig"  # its module needs Hydra
_PLAIN = ("an integer", "a number", "a string", "Any")  # types not shown beside a comment


def usage(verb: str, asked: Sequence[str] = ()) -> str:
    """The help of a verb, or of the groups and keys in `asked`.

    Raises:
        ConfigError: there is no such group or key.
    """
    if asked:
        return "\n".join(_about(verb, word.partition("=")[0].lstrip("+")) for word in asked)
    root: Any = root_of(verb)
    base = next((name for name in VERBS if root_of(name) in root.__mro__[1:]), None)  # whose keys it has too
    inherited = _keys(root_of(base)) if base else {}
    keys = {key: line for key, line in _keys(root).items() if key not in inherited}
    text = [f"txtrain {verb} [KEY=VALUE ...]", f"  {VERBS[verb].help}", "", VERBS[verb].examples]
    if base is None and (groups := groups_of(root)):
        text += ["Groups, and their options: txtrain --help GROUP says what each is"]
        text += [_line(f"{_word(g)}=NAME", ", ".join(_options(g))) for g in [*groups, LAUNCHER]]
        text += ["", "Keys; a group's have the values of its option"]
    text += [_line(*line) for line in keys.values()]
    shared = f"{', '.join(root.reads)} of {base}" if base and root.reads else f"every key of {base}"
    text += [textwrap.fill(f"  and {shared}: txtrain {base} --help", 118, subsequent_indent="    ")] if base else []
    return "\n".join([*text, "", FLAGS])


def _about(verb: str, word: str) -> str:
    """The options of a group, with the comments of their files, and its keys; or the keys below a dotted path."""
    groups = {name: g for g in [*groups_of(root_of(verb)), LAUNCHER] for name in (g, g.replace("/", "."), _word(g))}
    group = groups.get(word)
    keys = _keys(imported(_SLURM), "hydra.launcher.") if group == LAUNCHER else _keys(root_of(verb))
    path = (group or word).replace("/", ".")
    below = [_line(*line) for key, line in keys.items() if f"{key}.".startswith(f"{path}.")]
    if group is None and not below:
        owner = next((v for v in VERBS if any(f"{key}.".startswith(f"{path}.") for key in _keys(root_of(v)))), None)
        near = f" Did you mean txtrain {owner} --help {word}?" if owner else ""
        near = near or hint(word, [*groups, *keys], "txtrain --help {}") or meant_elsewhere("", word, "", (), keys)
        raise ConfigError(f"`{word}` must be a verb, a group or a key, to be asked about with --help.{near}")
    listed = [_line(f"{_word(group)}={option}", said) for option, said in _options(group).items()] if group else []
    return "\n".join([*listed, *([""] if listed and below else []), *below, ""])


def _word(group: str) -> str:
    return "recipe" if group == "recipes" else group


def _options(group: str) -> dict[str, str]:
    """Packaged option -> the comment at the head of its file; for a recipe its title."""
    found = {}
    for option in options(group):
        file = (DATA if group == "recipes" else CONF) / group / f"{option}.yaml"
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
        said = [line[2:] for line in itertools.takewhile(lambda line: line.startswith("# "), lines)]
        found[option] = " ".join(said[:1] if group == "recipes" else said)
    rows = {name: TABLE[g.rpartition("/")[2]][name].config for g, name in unwritten() if g == group}
    return found | {name: inspect.cleandoc(config.__doc__ or "").partition("\n")[0] for name, config in rows.items()}


# -------------------------------------------------------------------------------------------------------------- keys


def _keys(cls: type, prefix: str = "", defaults: bool = True) -> dict[str, tuple[str, str]]:
    """Dotted key -> the key, with its default where known, and its help text.

    defaults: whether the fields' defaults hold in a run, that is, no option's file overrides them.
    """
    found: dict[str, tuple[str, str]] = {}
    comments = _comments(cls)
    for f in dc.fields(cls):
        key = f"{prefix}{key_of(f)}"
        options, below = TABLE.get(f.metadata.get("axis", ""), {}), list(parts(cls, f))
        have = defaultdict[str, list[str]](list)  # key -> the options that have it
        for part in below:
            mine = _keys(part, f"{key}.", defaults and not options and key not in ("model", "trainer"))
            found |= {k: line for k, line in mine.items() if k not in found}
            for k in mine:
                have[k] += [name for name, option in options.items() if option.config is part]
        some = {k: f"[{', '.join(of)}]" for k, of in have.items() if len(of) < len(options)}
        found |= {k: (found[k][0], f"{of} {found[k][1]}") for k, of in some.items()}
        if below or f.name == "type":
            continue
        said, kind = comments.get(f.name, ""), hints(cls)[f.name]
        values = ", ".join(TABLE[f.metadata["choice"]]) if "choice" in f.metadata else describe(kind)
        default = f.default if isinstance(f.default, str) else json.dumps(f.default, default=str)
        shown = f"={default}" if defaults and f.default is not dc.MISSING else ""
        plain = values.removesuffix(" or null") in _PLAIN or (shown and kind is bool)
        found[key] = (key + shown, f"{said} ({values})" if said and not plain else said or values)
    return found


def _comments(cls: type) -> dict[str, str]:
    """Field -> the comment behind it, and in whole lines above it."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        fields, lines = _source(getattr(sys.modules[owner.__module__], "__file__", None))
        for node in fields.get(owner.__name__, ()):
            above = list(itertools.takewhile(lambda line: line.startswith("# "), reversed(lines[: node.lineno - 1])))
            behind = lines[node.end_lineno - 1].rpartition("  # ")[2] if "  # " in lines[node.end_lineno - 1] else ""
            words = [line[2:] for line in reversed(above) if "----" not in line]
            found[node.target.id] = " ".join([*words, behind]).strip()
    return found


@cache
def _source(file: str | None) -> tuple[dict[str, list[Any]], list[str]]:
    """Of a module: class -> its annotated names; and its lines without indentation."""
    if file is None or not file.endswith(".py"):
        return {}, []
    source = Path(file).read_text(encoding="utf-8")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    classes += [node for c in classes for node in c.body if isinstance(node, ast.ClassDef)]  # a component's own Config
    names = {c.name: [node for node in c.body if isinstance(node, ast.AnnAssign)] for c in classes}
    return names, [line.strip() for line in source.splitlines()]


def _line(key: str, said: str) -> str:
    first = f"  {key:<36} "
    further = " " * 39
    return textwrap.fill(said, 118, initial_indent=first, subsequent_indent=further) if said else f"  {key}"

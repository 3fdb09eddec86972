"""`resume=RUN`: the configuration of an earlier run, with `key=value` on top. Its config.yaml is data: nothing in it is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf, open_dict

from txtrain.composition import NOTES, Composed, Loader, load
from txtrain.config import ROOTS
from txtrain.errors import ConfigError
from txtrain.imports import target_problems
from txtrain.literals import escape
from txtrain.loggers.config import settled
from txtrain.overrides import check, groups_of, parse
from txtrain.typed import build

FREE = ("strategy", "trainer", "logger")  # the groups that a resumed run may choose anew


def run_folder(run_or_checkpoint: str) -> Path:
    """The run's folder: it has config.yaml, and its checkpoints lie in its folder `checkpoints`.

    Raises:
        ConfigError: there is none.
    """
    path = Path(run_or_checkpoint)
    folders = [path, path.parent.parent] if path.parent.name == "checkpoints" else [path]
    for folder in folders if path.exists() else ():
        if (folder / "config.yaml").is_file():
            return folder
    why = "has no config.yaml" if path.exists() else "does not exist"
    raise ConfigError(f"`resume` must be auto, never, or a run's folder or one of its checkpoints, but {run_or_checkpoint!r} {why}.")


def resumed(verb: str, run: str, overrides: list[str], loader: Loader) -> Composed:
    """The configuration in the run's folder, changed as the overrides say.

    Raises:
        ConfigError: no such run, a group that may not change, a key or value that does not exist.
    """
    folder, root = run_folder(run), ROOTS[verb]
    raw = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ConfigError(f"`resume`: {folder / 'config.yaml'} must be the config.yaml of a run, but is not a mapping.")
    parsed = [o for o in parse(overrides) if not o.is_hydra_override()]
    _refuse_others(parsed, root)
    saved_imports = raw.get("imports") or []
    raw |= {"imports": loader.imports(overrides), "resume": run, "run_dir": str(folder)}
    groups = [o for o in parsed if o.key_or_group in FREE]
    raw |= _composed_anew(verb, groups, raw, loader, root)
    for o in parsed:
        if o not in groups and o.key_or_group not in ("imports", "resume"):
            _set(raw, o.key_or_group, OmegaConf.to_container(OmegaConf.create({"value": o.value()}), resolve=True)["value"])  # type: ignore[call-overload, index]
    try:
        if problems := list(target_problems(raw, raw["imports"])):
            raise ConfigError(*problems)
        raw["logger"] = settled(raw.get("logger") or {})
        config: Any = build(root, raw)
    except ConfigError as e:
        if not saved_imports or raw["imports"]:
            raise
        again = f"imports=[{','.join(saved_imports)}]"
        raise ConfigError(*e.problems, f"`resume`: the run used {again}. Code is never imported by a checkpoint's word: name it again.") from e
    return Composed(config, {}, [o.key_or_group for o in parsed])


def _refuse_others(parsed: list[Override], root: type) -> None:
    groups = groups_of(root)
    problems = [
        f"`{o.input_line}`: a resumed run keeps its parts; only {', '.join(FREE)} may be chosen anew. Single values (a.b=c) may be given."
        for o in parsed
        if o.is_delete() or (o.key_or_group not in FREE and (o.key_or_group in groups or "/" in o.key_or_group))
    ]
    if problems:
        raise ConfigError(*problems)


def _composed_anew(verb: str, groups: list[Override], raw: dict[str, Any], loader: Loader, root: type) -> dict[str, Any]:
    """The named groups from their option's file, with the run's own name and folder where they refer to them."""
    if not groups:
        return {}
    cfg = load(verb, check([str(o.input_line) for o in groups], loader, root), loader)
    with open_dict(cfg):
        del cfg[NOTES]
        for key in ("name", "run_dir"):
            cfg[key] = escape(raw[key]) if isinstance(raw.get(key), str) else raw.get(key)
    return {o.key_or_group: OmegaConf.to_container(cfg[o.key_or_group], resolve=True) for o in groups}


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        inner = node.get(parent)
        node[parent] = node = inner if isinstance(inner, dict) else {}
    node[last] = value

"""`resume=RUN`: the configuration of an earlier run, with `key=value` on top.

Its config.yaml may be a stranger's: nothing in it is imported, interpolated or built. Loggers and callbacks come from
the command line, the user's --config-dir or the packaged options; differences from the file are reported.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf, open_dict

from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint.run_folder import RunFolder
from txtrain.config import loggers, targets
from txtrain.config.composed import NOTES, Composed
from txtrain.config.literals import escape
from txtrain.config.loader import Loader, load
from txtrain.config.overrides import check
from txtrain.config.paths import groups_of
from txtrain.errors import ConfigError
from txtrain.ground.convert import build, differing, flat, marked, without_foreign
from txtrain.ground.plain_files import check_keys


def run_folder(run_or_checkpoint: str) -> Path:
    """The folder of a run, given it or one of its checkpoints: it holds config.yaml and `checkpoints/`.

    Raises:
        ConfigError: there is none.
    """
    path = Path(run_or_checkpoint)
    full = checkpoint.in_full(path)
    folders = [path, full.parent.parent] if full.parent.name == checkpoint.FOLDER else [path]
    for folder in folders if path.exists() else ():
        if (folder / "config.yaml").is_file():
            return folder
    why = "has no config.yaml" if path.is_dir() else "is a file" if path.exists() else "does not exist"
    allowed = "auto, never, or a run's folder, one of its checkpoints, or a folder of runs"
    raise ConfigError(
        f"`resume` must be {allowed}, but {run_or_checkpoint!r} {why}.{checkpoint.nearest_run(path)}",
        *(_copy_of(folders[-1]) if path.is_dir() else ()),
    )


def _copy_of(folder: Path) -> list[str]:
    """The remedy for a damaged config.yaml: a checkpoint's copy, if there is one."""
    saved = [
        path / "config.yaml" for path in reversed(checkpoint.complete(folder)) if (path / "config.yaml").is_file()
    ][:1]
    return [
        f"A checkpoint has it as it was then: {shlex.join(('cp', str(path), str(folder / 'config.yaml')))}"
        for path in saved
    ]


def _read(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The run's config.yaml, and sentences on how it differs from its newest checkpoint's, which has a checksum.

    Raises:
        ConfigError: it is damaged (names a checkpoint with a copy), or the run is of a newer format.
    """
    _ = RunFolder(folder).facts
    try:
        raw = checkpoint.saved_config(folder)
    except ConfigError as e:
        raise ConfigError(*e.problems, *_copy_of(folder)) from e
    told: list[str] = []
    for newest in checkpoint.complete(folder)[-1:]:
        with contextlib.suppress(ConfigError):  # a damaged checkpoint is refused when it is read
            saved = checkpoint.saved_config(newest)
            told += [
                f"{key}: {old!r} in {newest.name}, {new!r} in the run's config.yaml"
                for key, old, new in differing(saved, raw, free=())
            ]
    return raw, told


def resumed(verb: str, root: type, run: str, overrides: Sequence[Override], loader: Loader) -> Composed:
    """The configuration in the run's folder with the overrides applied. root: its type.

    Raises:
        ConfigError: no such run, a group that may not change, no such key or value.
    """
    folder = run_folder(run)
    raw, edited = _read(folder)
    parsed = [o for o in overrides if not o.is_hydra_override()]
    _refuse_others(parsed, root)
    check_keys(raw, str(folder / "config.yaml"), {"imports": list[str] | None})
    saved_imports = raw.get("imports") or []
    raw |= {"imports": loader.imports(overrides), "resume": run, "run_dir": str(folder)}
    groups = [o for o in parsed if o.key_or_group in _free_groups(root)]
    given = [str(o.key_or_group) for o in parsed]
    saved = {part: raw.get(part) or {} for part in targets.ALLOWED}
    foreign, notes = _without_foreign(raw, given, root)
    raw |= _composed_anew(verb, groups, raw, loader, root)
    for o in parsed:
        if o not in groups and o.key_or_group not in ("imports", "resume"):
            value: Any = OmegaConf.to_container(OmegaConf.create({"value": o.value()}), resolve=True)
            _set(raw, o.key_or_group, value["value"])
    try:
        if problems := foreign + list(targets.problems(raw, raw["imports"])):
            raise ConfigError(*problems)
        raw["logger"] = loggers.settled(raw["logger"])
        config: Any = build(root, raw)
    except ConfigError as e:
        if not saved_imports or raw["imports"]:
            raise
        again = f"imports=[{','.join(saved_imports)}]"
        raise ConfigError(
            *e.problems,
            f"`resume`: the run used {again}. Code is never imported by a checkpoint's word: name it again."
        ) from e
    return Composed(config, {}, given, notes=(*edited, *notes, *_changes(saved, raw)))


def _without_foreign(raw: dict[str, Any], given: list[str], root: type) -> tuple[list[str], list[str]]:
    """Remove from a saved configuration, in place, what only the user may give: classes, hosts, paths outside the run.

    Returns:
        Problems: loggers and callbacks that must be named again; and sentences on what else was removed.
    """
    problems: list[str] = []
    raw["logger"], found = loggers.resumed(raw.get("logger"), given)
    problems += [] if "logger" in given else found
    callbacks = raw.get("callbacks")
    for name, node in callbacks.items() if isinstance(callbacks, dict) and "callbacks" not in given else ():
        if f"callbacks.{name}._target_" not in given:
            target = node.get("_target_") if isinstance(node, dict) else node
            problems.append(
                f"`callbacks.{name}` is {target!r} in the run's config.yaml, and a class that a file names is never "
                f"built. Name it again with its values: callbacks.{name}._target_=..., or leave it out: callbacks=none."
            )
    raw["callbacks"] = {}
    return problems, without_foreign(root, raw, given)


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Differences of loggers and callbacks from those in the run's file, as sentences."""
    old, new = (flat({part: tree.get(part) or {} for part in saved}) for tree in (saved, now))
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            before, after = (f"{side[key]!r}" if key in side else "absent" for side in (old, new))
            yield f"{key}: {before} in the run's config.yaml, now {after}"


def _free_groups(root: type) -> list[str]:
    """The groups of which a resumed run may choose another option."""
    groups = groups_of(root)
    return [key for key in marked(root, "free") if key in groups]


def _refuse_others(parsed: list[Override], root: type) -> None:
    groups, free = groups_of(root), _free_groups(root)
    only = f"only {', '.join(free)} may be chosen anew. Single values (a.b=c) may be given."
    problems = [
        f"`{o.input_line}`: a resumed run keeps its parts; {only}"
        for o in parsed
        if o.is_delete() or (o.key_or_group not in free and (o.key_or_group in groups or "/" in o.key_or_group))
    ]
    if problems:
        raise ConfigError(*problems)


def _composed_anew(
    verb: str, groups: list[Override], raw: dict[str, Any], loader: Loader, root: type
) -> dict[str, Any]:
    """The named groups from their options' files; these may refer to the run's name and folder."""
    if not groups:
        return {}
    cfg = load(verb, check(groups, loader, root), loader)
    with open_dict(cfg):
        del cfg[NOTES]
        for key in ("name", "run_dir"):
            cfg[key] = escape(raw[key]) if isinstance(raw.get(key), str) else raw.get(key)
    return {o.key_or_group: OmegaConf.to_container(cfg[o.key_or_group], resolve=True) for o in groups}


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    """A mapping is merged into what is there, as Hydra merges one into a new run's. Not so loggers and callbacks, which
    a stranger's file may name."""
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        inner = node.get(parent)
        node[parent] = node = inner if isinstance(inner, dict) else {}
    node[last] = value if key.partition(".")[0] in targets.ALLOWED else _merged(node.get(last), value)


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {name: _merged(old.get(name), value) for name, value in new.items()}

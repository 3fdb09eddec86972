"""Overrides -> Hydra -> plain dict -> typed config without Hydra's types."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from txtrain.config import targets
from txtrain.config.composed import NOTES, Composed, default_name
from txtrain.config.loader import Loader, load
from txtrain.config.loggers import settled
from txtrain.config.overrides import check, hydra_errors
from txtrain.config.published import sentence
from txtrain.config.schema import Train
from txtrain.errors import ConfigError
from txtrain.ground.convert import build


def compose_job(
    verb: str, root: type, overrides: list[Override], loader: Loader
) -> tuple[Composed, list[Override]]:
    """One job of `expand`, from its overrides or the run that it resumes; and its overrides as passed to Hydra.

    Raises:
        ConfigError: the overrides or the configuration are wrong.
    """
    with hydra_errors():
        loader.imports(overrides)  # registers the user's options before they are looked up
        if not loader.repository.config_exists(verb):  # a verb needs a YAML file only for defaults of its own
            ConfigStore.instance().store(verb, {"defaults": ["train" if issubclass(root, Train) else "base", "_self_"]})
        run = next(
            (str(o.value()) for o in reversed(overrides) if o.key_or_group == "resume" and not o.is_delete()), "auto"
        )
        if issubclass(root, Train) and not root.reads and run not in ("auto", "never"):
            from txtrain.checkpoint.format import newest_run
            from txtrain.config.resume_from import resumed

            return resumed(verb, root, newest_run(run, "resume"), overrides, loader), overrides
        lines = check(overrides, loader, root)
        return typed(load(verb, lines, loader), root), lines


def typed(cfg: DictConfig, root: type) -> Composed:
    """From a DictConfig to the dataclass; nothing below uses OmegaConf."""
    cfg = copy.copy(cfg)
    with open_dict(cfg):
        cfg.pop("hydra", None)  # holds ??? and resolvers of its own
        notes: Any = OmegaConf.to_container(cfg.pop(NOTES), resolve=False)
        if issubclass(root, Train) and cfg.get("name") is None:
            cfg.name = default_name(*(str(notes["choices"].get(group) or "") for group in ("model", "data")))
    raw: Any = OmegaConf.to_container(cfg, resolve=True)
    raw["imports"] = notes["imports"]
    if "recipes" in raw:
        raise ConfigError("`recipe`: its file must have the line `# @package _global_` at its top.")
    problems = [*_types_elsewhere(raw, notes["types"]), *targets.problems(raw, raw["imports"])]
    if problems:
        raise ConfigError(*problems)
    if "logger" in raw:
        raw["logger"] = settled(raw["logger"])
    config: Any = build(root, raw)
    if issubclass(root, Train) and (unread := [*root.unread(notes["given"])]):
        raise ConfigError(*unread)
    grafts = notes["grafts"] | _moved_norm(config, notes["norm_position"])
    told = (sentence(config, notes["training"]),) if notes["training"] and isinstance(config, Train) else ()
    return Composed(config, grafts, notes["given"], notes=told)


def _types_elsewhere(raw: Any, types: dict[str, str]) -> Iterator[str]:
    """A `type` set outside an option's own file would bypass the graft rule."""
    for group, kind in types.items():
        node = raw
        for part in group.split("/"):
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and node.get("type", kind) != kind:
            yield (
                f"`{group.replace('/', '.')}.type` must be chosen by its group, but is {node['type']!r} over {kind!r}: "
                f"write {group}={node['type']}."
            )


def _moved_norm(config: Any, own: str) -> dict[str, dict[str, Any]]:
    if not isinstance(config, Train) or config.model.norm_position == own:
        return {}
    return {"norm_position": {"from": own, "to": config.model.norm_position, "kept": {}, "dropped": {}}}

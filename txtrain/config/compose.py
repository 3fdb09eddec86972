"""Command line -> Hydra -> plain dict -> typed config. With overrides.py, grafts.py and cli/sweep.py all that touches Hydra.

`@hydra.main` and `hydra.compose` are both by-passed for the loader below them: they exit with 1 and a page of text where a user's
mistake wants 2 and a line, write folders before anything is checked, and keep process-wide state.
"""

from __future__ import annotations

import copy
import dataclasses as dc
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl  # pinned: hydra-core ~= 1.3.2
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.hydra import Hydra
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from txtrain.config import targets
from txtrain.config.grafts import GraftedRepository
from txtrain.config.init_from import applied
from txtrain.config.loggers import settled
from txtrain.config.overrides import check, expand, groups_of, hydra_errors, parse
from txtrain.config.paths import CONF, DATA
from txtrain.config.schema import ROOTS, Generate, Train
from txtrain.config.user_code import import_user
from txtrain.convert import build, plain
from txtrain.errors import ConfigError

NOTES = "_txtrain"  # the node in which the loader hands the door what is not configuration


@dc.dataclass(frozen=True)
class Composed:
    """A validated configuration and how it came about.

    Attributes:
        grafts: axis -> {from, to, kept, dropped} for each axis that is not the family's own.
        given: keys that the user set.
        folder: under runs/<name>/, where config.run_dir is null; None: the time or the SLURM job. Jobs of `-m` have numbers.
        notes: sentences for the start screen.
    """

    config: Any
    grafts: dict[str, dict[str, Any]]
    given: list[str]
    folder: str | None = None
    notes: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------------------- loading


class Loader(ConfigLoaderImpl):
    """Hydra's loader, with the user's imports before and the graft rule within. Launchers pickle it and call it on other machines."""

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        imports = self.imports(overrides)
        cfg = super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        with open_dict(cfg):
            cfg[NOTES].imports = imports
            cfg[NOTES].given = [o.key_or_group for o in parse(overrides) if not o.is_hydra_override()]
            cfg[NOTES].choices = {g: c for g, c in cfg.hydra.runtime.choices.items() if g in ("model", "data")}
        return cfg

    def _compose_config_from_defaults_list(self, defaults: list[Any], repo: Any) -> DictConfig:
        grafted: Any = GraftedRepository(repo, defaults, frozenset(self.named))
        cfg = super()._compose_config_from_defaults_list(defaults, grafted)
        cfg[NOTES] = {"grafts": grafted.report, "types": grafted.types, "norm_position": grafted.norm_position}
        return cfg

    def imports(self, overrides: Sequence[str]) -> list[str]:
        """Import what the command line names, and what options of the user's own folder bring that the command line names."""
        self.named: list[str] = []
        found: dict[str, None] = {}
        groups = groups_of(Train)
        for o in parse(overrides):
            if o.is_sweep_override() or o.is_delete() or o.is_hydra_override():
                continue
            value: Any = o.value()
            if o.key_or_group == "imports":
                for what in value if isinstance(value, list) else [value]:
                    found[import_user(str(what), Path.cwd())] = None
                continue
            for option in value if isinstance(value, list) else [value]:
                if isinstance(option, str) and o.key_or_group in groups:
                    found |= dict.fromkeys(self._imports_of(f"{o.key_or_group}/{option}"))
        return list(found)

    def _imports_of(self, path: str) -> Iterator[str]:
        result = self.repository.load_config(path)
        if result is not None and result.provider == "command-line":
            self.named.append(path)
            content: Any = OmegaConf.to_container(result.config, resolve=False)
            for what in content.get("imports") or []:
                yield import_user(str(what), Path(result.path.removeprefix("file://")))


def make_loader(config_dir: str | None = None) -> Loader:
    """A loader over conf/, recipes/, and the user's own folder of options and recipes, which adds and cannot shadow."""
    # a user's YAML and component of one name are no accident: the YAML sets other defaults
    warnings.filterwarnings("ignore", message="(?s).*validated against ConfigStore schema")
    version.setbase("1.3")  # unset means 1.1, where jobs change directory
    Plugins.instance()  # registers the sources file:, pkg: and structured:
    path = ConfigSearchPathImpl()
    path.append("hydra", "pkg://hydra.conf")
    path.append("main", f"file://{CONF}")
    path.append("recipes", f"file://{DATA}")
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(f"`--config-dir` must be a folder that exists, but is {config_dir!r} instead.")
        path.append("command-line", f"file://{Path(config_dir).resolve()}")
    path.append("schema", "structured://")
    return Loader(path)


# ----------------------------------------------------------------------------------------------------------------- composing


def compose(overrides: Sequence[str] = (), verb: str = "train", config_dir: str | None = None) -> Train | Generate:
    """The typed, validated configuration that `txtrain VERB OVERRIDES` would run.

    Raises:
        ConfigError: whatever the command line would refuse, in the same words.
    """
    if verb not in ROOTS:
        raise ConfigError(f"`verb` must be one of {', '.join(ROOTS)}, but is {verb!r} instead.")
    loader = make_loader(config_dir)
    config: Train | Generate = compose_job(verb, expand(overrides, False, loader)[0], loader)[0].config
    return config


def compose_job(verb: str, overrides: list[str], loader: Loader) -> tuple[Composed, list[str]]:
    """One job of `expand`, and its overrides as Hydra got them."""
    root = ROOTS[verb]
    with hydra_errors():
        loader.imports(overrides)  # the user's options must exist before they are looked up
        values = {o.key_or_group: o.value() for o in parse(overrides) if not o.is_delete()}
        if issubclass(root, Train) and str(values.get("resume", "auto")) not in ("auto", "never"):
            from txtrain.config.resume_from import resumed

            return resumed(verb, str(values["resume"]), overrides, loader), overrides
        lines = check(overrides, loader, root)
        return applied(typed(load(verb, lines, loader), root)), lines


def load(verb: str, lines: list[str], loader: Loader) -> DictConfig:
    return Hydra("txtrain", loader).compose_config(verb, lines, run_mode=RunMode.RUN)


# ------------------------------------------------------------------------------------------- handed to a process of our own


def to_file(job: Composed, file: Path) -> None:
    """What `from_file` reads in a process that we start."""
    notes = {"grafts": job.grafts, "given": job.given, "folder": job.folder, "notes": list(job.notes)}
    file.write_text(yaml.safe_dump(plain(job.config) | {NOTES: notes}, sort_keys=False, allow_unicode=True), encoding="utf-8")


def from_file(verb: str, file: str) -> Composed:
    """A job that another process composed and validated: one of a sweep, or a further rank of a run, whose file is its config.yaml."""
    raw = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    notes = raw.pop(NOTES, {})
    for what in raw["imports"]:
        import_user(what, Path.cwd())
    return Composed(build(ROOTS[verb], raw), notes.get("grafts", {}), notes.get("given", []), notes.get("folder"), tuple(notes.get("notes", ())))


# ------------------------------------------------------------------------------------------------------------------ the door


def typed(cfg: DictConfig, root: type) -> Composed:
    """The door: a DictConfig comes in, a dataclass goes out. Nothing below knows OmegaConf."""
    cfg = copy.copy(cfg)
    with open_dict(cfg):
        cfg.pop("hydra", None)  # holds ??? and resolvers of its own
        notes: Any = OmegaConf.to_container(cfg.pop(NOTES), resolve=False)
        if issubclass(root, Train) and cfg.get("name") is None:
            cfg.name = "-".join(str(notes["choices"][g]).replace("/", "-") for g in ("model", "data") if notes["choices"].get(g))
    raw: Any = OmegaConf.to_container(cfg, resolve=True)
    raw["imports"] = notes["imports"]
    if "recipes" in raw:
        raise ConfigError("`recipe`: its file must have the line `# @package _global_` at its top, so that its keys are those of the command line.")
    problems = [*_types_elsewhere(raw, notes["types"]), *targets.problems(raw, raw["imports"])]
    if problems:
        raise ConfigError(*problems)
    if "logger" in raw:
        raw["logger"] = settled(raw["logger"])
    config: Any = build(root, raw)
    grafts = notes["grafts"] | _moved_norm(config, notes["norm_position"])
    return Composed(config, grafts, notes["given"])


def _types_elsewhere(raw: Any, types: dict[str, str]) -> Iterator[str]:
    """`type` written anywhere but in an option's own file would dodge the graft rule."""
    for group, kind in types.items():
        node = raw
        for part in group.split("/"):
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and node.get("type", kind) != kind:
            yield f"`{group.replace('/', '.')}.type` must be chosen by its group, but is {node['type']!r} over {kind!r}: write {group}={node['type']}."


def _moved_norm(config: Any, own: str) -> dict[str, dict[str, Any]]:
    if not isinstance(config, Train) or config.model.norm_position == own:
        return {}
    return {"norm_position": {"from": own, "to": config.model.norm_position, "kept": {}, "dropped": {}}}

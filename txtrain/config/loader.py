"""Hydra's loader over conf/, recipes/ and the user's own folder.

It is used without `@hydra.main` and `hydra.compose`, which exit with 1 and a page of text on a user's mistake, write
folders before anything is checked, and keep process-wide state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl  # pinned: hydra-core ~= 1.3.2
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from txtrain.config.composed import NOTES
from txtrain.config.grafts import GraftedRepository
from txtrain.config.literals import escape
from txtrain.config.overrides import parse
from txtrain.config.paths import CONF, DATA, groups_of, unwritten
from txtrain.config.published import sequences
from txtrain.config.schema import Train
from txtrain.config.user_code import import_user
from txtrain.errors import ConfigError

# Here, not in make_loader: launchers unpickle a loader on other machines.
OmegaConf.register_new_resolver("sequences", sequences, replace=True)


_READ: dict[tuple[Any, ...], ConfigResult | None] = {}

_known_choices = defaults_list._create_interpolation_map
_NONE_ASKED = OmegaConf.create()


def _where_asked(overrides: Any, defaults_list: list[Any], self_added: bool) -> DictConfig:
    """What a default such as `${model}` reads; Hydra makes it for each file, a fifth of the time of composing."""
    asked = any(default.is_interpolation() for default in defaults_list)
    return _known_choices(overrides, defaults_list, self_added) if asked else _NONE_ASKED


defaults_list._create_interpolation_map = _where_asked


class Repository(ConfigRepository):
    """Hydra's, which reads a file once in a process, as long as it does not change."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or source.scheme() not in ("file", "pkg"):
            return super().load_config(config_path)
        of_file: tuple[int, ...] = ()  # what a package holds does not change
        if source.scheme() == "file":
            seen = Path(source.path, config_path.removesuffix(".yaml") + ".yaml").stat()
            of_file = seen.st_mtime_ns, seen.st_size, seen.st_ino
        key = source.provider, source.path, config_path, of_file
        if key not in _READ:
            _READ[key] = super().load_config(config_path)
        return _READ[key]  # `GraftedRepository` copies it before it is merged


class Loader(ConfigLoaderImpl):
    """Hydra's loader with the user's imports and the graft rule. Overrides are parsed, or strings from launchers,
    which pickle the loader and call it on other machines."""

    def __init__(self, config_search_path: Any) -> None:
        super().__init__(config_search_path)
        self.repository = Repository(config_search_path)

    def load_configuration(
        self, config_name: str | None, overrides: Sequence[str | Override], run_mode: RunMode, from_shell: bool = True,
        validate_sweep_overrides: bool = True
    ) -> DictConfig:
        parsed: list[Any] = parse(overrides)
        imports = self.imports(parsed)
        # `data=` names a source, to which the published batch applies
        groups = {"objective", "optimizer", "scheduler", "trainer"}
        self.chosen = frozenset(o.key_or_group for o in parsed if isinstance(o.value(), str)) & groups
        given = [str(o.key_or_group) for o in parsed if not o.is_hydra_override()]

        def composed(lines: list[Any]) -> DictConfig:
            cfg = super(Loader, self).load_configuration(
                config_name, lines, run_mode, from_shell, validate_sweep_overrides
            )
            choices = {g: c for g, c in cfg.hydra.runtime.choices.items() if g in ("model", "data")}
            with open_dict(cfg):
                cfg[NOTES].update(imports=imports, given=given, choices=choices)
            return cfg

        cfg = composed(parsed)
        # a run that is resumed has the model in its config.yaml
        starts = isinstance(cfg.get("init_from"), str) and "model" in cfg
        return self._over_weights(cfg, parsed, composed) if starts and cfg.resume in ("auto", "never") else cfg

    def _over_weights(
        self, cfg: DictConfig, parsed: list[Override], composed: Callable[[list[Any]], DictConfig]
    ) -> DictConfig:
        """The configuration over the model of `init_from`. cfg: that over the model which the command line names.

        Raises:
            ConfigError: `init_from` holds no model, or another one than is named.
        """
        from txtrain.config import init_from

        notes = cfg[NOTES]
        chosen = [o for o in parsed if o.key_or_group == "model" and not isinstance(o.value(), dict)]
        named = str(notes.choices["model"]) if chosen or notes.recipe_names_model else None
        found = init_from.find(cfg, named, str(notes.choices.get("data") or ""))
        family = found.model.family
        known = family != init_from.OPTION and self.repository.config_exists(f"model/{family}")
        parent = named or (family if known else None)
        init_from.store(found.model, parent, named is not None)
        again = composed([*(o for o in parsed if o not in chosen), *parse([f"model={init_from.OPTION}"])])
        with open_dict(again):
            again[init_from.KEY] = escape(cfg[init_from.KEY])
            again[NOTES].choices.model = escape(parent or family)
        if named is not None:
            init_from.check_named(cfg, again, named)
        init_from.settle_tokenizer(again, found, notes.given)
        init_from.settle_adapter(again, found, notes.given)
        return again

    def _parse_overrides_and_create_caching_repo(
        self, config_name: str | None, overrides: Sequence[str | Override]
    ) -> tuple[list[Override], CachingConfigRepository]:
        parsed, repository = parse(overrides), CachingConfigRepository(self.repository)
        self._process_config_searchpath(config_name, parsed, repository)
        return parsed, repository

    def _compose_config_from_defaults_list(self, defaults: list[Any], repo: Any) -> DictConfig:
        grafted: Any = GraftedRepository(repo, defaults, frozenset(self.named), self.chosen)
        cfg = super()._compose_config_from_defaults_list(defaults, grafted)
        cfg[NOTES] = {
            "grafts": grafted.report, "types": grafted.types, "norm_position": grafted.norm_position,
            "recipe_names_model": grafted.recipe_names_model,
            "training": grafted.training,
        }
        return cfg

    def imports(self, overrides: Sequence[Override]) -> list[str]:
        """Import the files and modules of `imports=`, and those of the options in the user's folder that are chosen."""
        self.named: list[str] = []
        found: dict[str, None] = {}
        groups = groups_of(Train) if any(source.provider == "command-line" for source in self.get_sources()) else ()
        for o in overrides:
            if o.is_sweep_override() or o.is_delete() or o.is_hydra_override():
                continue
            value: Any = o.value()
            values = value if isinstance(value, list) else [value]
            if o.key_or_group == "imports":
                found |= {import_user(str(what), Path.cwd()): None for what in values}
            elif o.key_or_group in groups:
                for option in values:
                    if isinstance(option, str):
                        found |= dict.fromkeys(self._imports_of(f"{o.key_or_group}/{option}"))
        for group, name in unwritten():
            ConfigStore.instance().store(name, {"type": name}, group)
        return list(found)

    def _imports_of(self, path: str) -> Iterator[str]:
        result = self.repository.load_config(path)
        if result is not None and result.provider == "command-line":
            self.named.append(path)
            content: Any = OmegaConf.to_container(result.config, resolve=False)
            for what in content.get("imports") or []:
                yield import_user(str(what), Path(result.path.removeprefix("file://")))


def make_loader(config_dir: str | None = None) -> Loader:
    """A loader over conf/, recipes/ and the user's own folder, which adds options and recipes but overrides none."""
    # a user's YAML file may have a component's name: it sets other defaults
    warnings.filterwarnings("ignore", message="(?s).*validated against ConfigStore schema")
    version.setbase("1.3")  # unset it is 1.1, with which jobs change directory
    Plugins.instance()  # registers file:, pkg: and structured:
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


def load(verb: str, overrides: Sequence[Override], loader: Loader) -> DictConfig:
    """Hydra's configuration of a verb, from overrides as `check` returns them."""
    lines: Any = list(overrides)  # parsed already: `Loader._parse_overrides_and_create_caching_repo`
    return Hydra("txtrain", loader).compose_config(verb, lines, run_mode=RunMode.RUN)

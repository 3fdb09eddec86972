"""The graft rule: which values survive when another option is chosen on an axis.

A file's values for an axis belong to the option that this file selects. Families, sizes and recipes are layers of the
same rule: Mistral is Llama 2 with a graft. When Hydra loads such a file, the values that do not carry over from the
file's own option to the chosen one are removed before the merge, which keeps Hydra's order: option < family < size
< recipe < command line.

    llama2.yaml        mistral.yaml       model/attention=mqa
    mha ------------>  gqa ------------>  mqa
    bias: false kept   window: 64 kept    (same class: only what the options' files set is dropped)
                       n_kv_heads dropped

A published size also has a file of conf/training: its paper's values for other groups than the model. Those of a group
that the command line or a recipe chooses are removed, so that the group's own option holds.
"""

from __future__ import annotations

import copy
import dataclasses as dc
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from hydra.core.default_element import ConfigDefault, GroupDefault, ResultDefault
from omegaconf import OmegaConf

from txtrain.errors import ConfigError
from txtrain.registry import MODEL_AXES, TABLE, group_of

_CHANGED = ("model/", "recipes/", "training/")  # files of which values may be removed


def is_family(path: str | None) -> bool:
    return path is not None and path.startswith("model/") and path.count("/") == 1


def is_recipe(path: str | None) -> bool:
    return path is not None and path.startswith("recipes/")


def is_training(path: str | None) -> bool:
    return path is not None and path.startswith("training/")


class GraftedRepository:
    """A Hydra config repository that drops the values of each file that do not hold for the chosen options.

    Attributes:
        report: axis -> {from, to, kept, dropped}, for axes whose chosen option is not the family's or recipe's own;
            complete once every file is loaded.
        types: group -> the `type` that its chosen file sets.
        training: of a published size, `file` and the `values` by group that its paper has; complete as `report`.
    """

    def __init__(
        self, repository: Any, defaults: list[ResultDefault], named: frozenset[str], chosen: frozenset[str]
    ) -> None:
        self.repository = repository
        self.named = named  # options that the command line names: only these may have imports
        paths = [d.config_path for d in defaults if d.config_path is not None]
        self.packages = {d.config_path: d.package for d in defaults}
        self.families = [p for p in paths if is_family(p)]  # ancestors first
        self.recipes = [p for p in paths if is_recipe(p)]
        self.chosen = {axis: p.split("/")[2] for p in paths for axis in MODEL_AXES if p.startswith(f"model/{axis}/")}
        groups = [(p, p.rpartition("/")[0]) for p in paths]
        typed = set(map(group_of, TABLE))  # groups whose options carry `type`
        self.types = {g: kind for p, g in groups if g in typed and (kind := self._leaf(p).get("type"))}
        self.training: dict[str, Any] = {}
        of_recipes = [d for r in self.recipes for d in self._defaults(r) if isinstance(d, GroupDefault)]
        # groups that the command line (`chosen`) or a recipe chooses
        self.explicit = chosen | {str(d.group).strip("/") for d in of_recipes} - {"data"}
        self.report: dict[str, dict[str, Any]] = {}
        for axis, to in self.chosen.items() if self.families else ():
            own = [self.selected(self.families[-1], axis), *(self.selected(r, axis) for r in self.recipes)]
            if others := [option for option in own if option not in (None, to)]:
                self.report[axis] = {"from": others[0], "to": to, "kept": {}, "dropped": {}}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.repository, name)

    @property
    def norm_position(self) -> str:
        """The family's own: a plain value, not filtered."""
        own = [str(p) for f in self.families if (p := self._leaf(f).get("norm_position"))]
        return own[-1] if own else "pre"

    @property
    def recipe_names_model(self) -> bool:
        """Whether a recipe chooses the model."""
        chosen = [d for r in self.recipes for d in self.repository.load_config(r).defaults_list or []]
        return any(isinstance(d, GroupDefault) and d.group == "/model" for d in chosen)

    # ----------------------------------------------------------------------------------------------------- Hydra's hook

    def load_config(self, config_path: str) -> Any:
        result = self.repository.load_config(config_path)
        if result is None:
            return None
        result = copy.copy(result)  # the repository caches it
        if not self.packages.get(config_path) or config_path.startswith(_CHANGED) or result.provider == "command-line":
            result.config = copy.deepcopy(result.config)  # else Hydra copies it into its package
        if result.provider == "command-line" and result.config.get("imports"):
            if config_path not in self.named:
                group, _, option = config_path.rpartition("/")
                name = f"{group}={option}"
                raise ConfigError(f"`imports` in {config_path}.yaml must be asked for: give {name}, or imports=[...].")
            del result.config["imports"]  # imported before composing
        if is_family(config_path):
            self._filter(result.config, self.families[self.families.index(config_path) :])
            self._keep_labels_apart(result.config, config_path)
        elif is_recipe(config_path):
            self._filter(result.config.get("model") or {}, [config_path])
        elif is_training(config_path):
            for group, values in _plain(result.config).items():
                values = self.training.get("values", {}).get(group, {}) | values
                self.training = {"file": config_path, "values": self.training.get("values", {}) | {group: values}}
            for group in self.explicit:
                result.config.pop(group, None)
        return result

    def _filter(self, node: Any, layers: list[str]) -> None:
        """Remove from `node`, the model values of the file layers[0], what does not survive."""
        for axis in MODEL_AXES:
            values = _plain(node[axis]) if axis in node and axis in self.chosen else None
            if not isinstance(values, dict):
                continue
            own = [option for layer in layers if (option := self.selected(layer, axis)) is not None]
            for name, value in values.items():
                if not all(self.survives(axis, name, a, b) for a, b in pairwise(own)):
                    del node[axis][name]  # dropped within the family: not reported
                elif own and own[-1] != self.chosen[axis]:
                    kept = self.survives(axis, name, own[-1], self.chosen[axis])
                    self.report[axis]["kept" if kept else "dropped"][name] = value
                    if not kept:
                        del node[axis][name]

    def _keep_labels_apart(self, node: Any, path: str) -> None:
        """Drop an ancestor's `published`: mappings merge, so that it would stay in its heirs."""
        heirs = self.families[self.families.index(path) + 1 :]
        if "published" in node and any("family" in self._leaf(h) for h in heirs):
            del node["published"]

    # --------------------------------------------------------------------------------------------------------- the rule

    def survives(self, axis: str, name: str, mine: str, want: str) -> bool:
        """Whether a value of the key `name`, given for option `mine`, holds for option `want` too."""
        if mine == want:
            return True
        a, b = self._config_class(axis, mine), self._config_class(axis, want)
        if a is None or b is None:
            return False
        if a is b:  # options of one class differ only in what their own files set
            return name not in {*self._leaf(f"model/{axis}/{mine}"), *self._leaf(f"model/{axis}/{want}")}
        return all(name in {f.name for f in dc.fields(cls) if f.metadata.get("carry")} for cls in (a, b))

    def selected(self, path: str, axis: str) -> str | None:
        """The option of `axis` that the file at `path` selects by default."""
        defaults = self._defaults(path)
        for d in defaults:
            if isinstance(d, GroupDefault) and d.group in (axis, f"/model/{axis}"):
                return str(d.value)
        for parent in self._parents(path, defaults):
            if (option := self.selected(parent, axis)) is not None:
                return option
        return self.selected(self.families[-1], axis) if is_recipe(path) and self.families else None

    @staticmethod
    def _parents(path: str, defaults: list[Any]) -> Iterator[str]:
        for d in defaults:
            if isinstance(d, ConfigDefault) and not d.is_self() and d.path is not None:
                yield d.path[1:] if d.path.startswith("/") else f"{path.rpartition('/')[0]}/{d.path}"
            elif isinstance(d, GroupDefault) and d.group == "/model":
                yield f"model/{d.value}"

    def _defaults(self, path: str) -> list[Any]:
        result = self.repository.load_config(path)
        return (result.defaults_list or []) if result else []

    def _leaf(self, path: str) -> dict[str, Any]:
        result = self.repository.load_config(path)
        made = _plain(result.config) if result else None
        return made if isinstance(made, dict) else {}

    def _config_class(self, axis: str, option: str) -> type | None:
        kind = self._leaf(f"model/{axis}/{option}").get("type", option)
        return TABLE[axis][kind].config if kind in TABLE[axis] else None


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node

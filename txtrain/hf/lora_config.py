"""adapter=lora: PEFT's knobs, and which matrices they mean, by our names or those of transformers. No torch."""

from __future__ import annotations

import dataclasses as dc
import math
import re
from collections.abc import Collection, Iterator
from functools import cached_property
from typing import Any, ClassVar

from txtrain.errors import ConfigError, hint
from txtrain.hf.name_map import EXPERT, Row, by_layer, respelt
from txtrain.model.adapter import AdapterConfig, factor_of
from txtrain.model.config import ModelConfig
from txtrain.model.transform import Transform
from txtrain.registry import config, knob, register

ADAPTER_CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of PEFT's folder
PREFIX = "base_model.model."  # of its tensors
CLASSES = "classes"  # in the header of WEIGHTS: the names of the classes, and their kind
ALL = "all-linear"
_DEFAULT = ("q_proj", "v_proj")  # the paper's choice (2106.09685, section 7.1), and PEFT's for most models


@config
class LoraConfig(AdapterConfig):
    """LoRA (2106.09685): W x + scaling * B (A x), with W frozen. Names and defaults are PEFT's."""

    r: int = knob(8, at_least=1)  # rank of the added matrices
    lora_alpha: float = knob(8.0, above=0)  # what is added is scaled by lora_alpha / r
    lora_dropout: float = knob(0.0, at_least=0, below=1, affects="dropout")  # of the adapter's input
    # ends of modules' names, ours or Hugging Face's; a string: a regular expression for whole names, or all-linear:
    # all matrices but the head's. null: queries and values
    target_modules: tuple[str, ...] | str | None = None
    rslora: bool = False  # scale by lora_alpha / sqrt(r) instead (2312.03732); PEFT's use_rslora
    # modules that are trained whole and saved with the adapter, by our names or Hugging Face's; a head of classes
    # always is, as in PEFT
    modules_to_save: tuple[str, ...] = ()

    alone: ClassVar[bool] = True

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def targets(self) -> list[tuple[str, str]]:
        """Each one's key, and what it says."""
        key, targets = "adapter.target_modules", self.target_modules
        if isinstance(targets, str):
            return [(key, targets)]
        return [(key, end) for end in _DEFAULT] if targets is None else [
            (f"{key}[{i}]", end) for i, end in enumerate(targets)
        ]

    def whole(self, model: ModelConfig) -> list[str]:
        return list(dict.fromkeys((*(["head"] if model.head.pools else []), *self.modules_to_save)))

    def means(self, target: str, names: Collection[str]) -> bool:
        """Whether a target means the matrix of these names, ours first."""
        if not isinstance(self.target_modules, str):
            return any(f".{name}".endswith(f".{target}") for name in names)
        if target == ALL:
            return not next(iter(names)).startswith("head.")
        return any(re.fullmatch(target, name) for name in names)

    def check(self) -> Iterator[str]:
        targets = self.target_modules
        if "" in self.modules_to_save:
            yield f"`adapter.modules_to_save` must be names of modules, but is {list(self.modules_to_save)} instead."
        if targets == ():
            yield "`adapter.target_modules` must name at least one module, but is [] instead. Nearest: null."
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as e:
                yield f"`adapter.target_modules` must be a list or a regular expression, but is {targets!r}: {e}."

    def transforms(self, model: ModelConfig) -> tuple[Transform, ...]:
        return (Lora(self, model),)


register("adapter", "lora", "txtrain.hf.lora_config:Lora", LoraConfig)


@dc.dataclass(frozen=True)
class Lora(Transform):
    """Freezes the model but for the modules to save, and gives the matrices that are meant their factors."""

    config: LoraConfig
    model: ModelConfig

    @cached_property
    def _rows(self) -> dict[str, Row]:
        return adaptable(self.model)

    @cached_property
    def _theirs(self) -> dict[str, list[str]]:
        """transformers' names of the modules, by our matrix."""
        found: dict[str, list[str]] = {}
        for module, row in self._rows.items():
            for ours in row.ours:
                found.setdefault(ours, []).extend({module, row.theirs})
        return found

    @cached_property
    def _ranks(self) -> dict[str, int]:
        return {}  # of the matrices asked for so far

    @cached_property
    def _kept(self) -> dict[str, bool]:
        return {}  # of the parameters and buffers asked for so far

    @cached_property
    def _whole(self) -> list[str]:
        return self.config.whole(self.model)

    def _owners(self, name: str) -> list[str]:
        """Names of the module that has a parameter or buffer: ours, transformers', and what of ours lies there too."""
        owner, theirs = parent_of(name), [parent_of(there) for there in self._theirs.get(name, ())]
        beside = [ours for there in theirs if there in self._rows for ours in self._rows[there].ours]
        return [*self._names(owner), *theirs, *beside]

    def _is_of(self, said: str, name: str) -> bool:
        """Whether a parameter or buffer belongs to the module that is meant."""
        return any(f".{said}." in f".{owner}." for owner in self._owners(name))

    def _names(self, matrix: str) -> list[str]:
        return [matrix, *self._theirs.get(matrix, ())]

    def rank(self, matrix: str) -> int:
        if matrix not in self._ranks:
            names, config = self._names(matrix), self.config
            meant = any(config.means(said, names) for _, said in config.targets) and not self.keeps(f"{matrix}.weight")
            self._ranks[matrix] = config.r if meant and not self.keeps(matrix) else 0
        return self._ranks[matrix]

    def keeps(self, name: str) -> bool:
        if name not in self._kept:
            self._kept[name] = factor_of(name) is not None or any(self._is_of(said, name) for said in self._whole)
        return self._kept[name]

    def trains(self, name: str) -> bool:
        return self.keeps(name)

    def problems(self, names: Collection[str]) -> Iterator[str]:
        ours = [name.removesuffix(".weight") for name in names if factor_of(name) is None]
        yield from self._without(ours, ours, "is in none of their names")
        for i, said in enumerate(self.config.modules_to_save):
            if not any(self._is_of(said, name) for name in names):
                why = self._no_module(said, names)
                yield f"`adapter.modules_to_save[{i}]` must name a module of the model, but {why}"

    def _no_module(self, said: str, names: Collection[str]) -> str:
        if self.model.tie_word_embeddings and said.rpartition(".")[2] in ("head", "lm_head"):
            return f"{said!r} has no matrix of its own: it is the embedding's, and is trained with embedding.token."
        parts = (part for name in names for owner in self._owners(name) for part in owner.split("."))
        return f"{said!r} is none.{hint(said, dict.fromkeys(parts))}"

    def shortcomings(self, names: Collection[str]) -> Iterator[str]:
        factors = [factor for name in names if (factor := factor_of(name))]
        ours = [name.removesuffix(".weight") for name in names if factor_of(name) is None]
        yield from self._without({f.matrix for f in factors}, ours, "is none of them")
        if self.config.lora_dropout and (stacked := next((f.matrix for f in factors if f.stacked), None)):
            yield (
                f"`adapter.lora_dropout` must be 0 with an adapter of experts ({stacked}), but is "
                f"{self.config.lora_dropout} instead: PEFT has none there either."
            )

    def _without(self, matrices: Collection[str], ours: Collection[str], why: str) -> Iterator[str]:
        """Sentences on the targets that mean none of these matrices. ours: all names, for the nearest."""
        for key, said in self.config.targets:
            if not any(self.config.means(said, self._names(matrix)) for matrix in matrices):
                if any(self.config.means(said, self._names(m)) and self.keeps(f"{m}.weight") for m in ours):
                    why = "is trained whole (adapter.modules_to_save)"
                parts = (part for matrix in ours for name in self._names(matrix) for part in name.split("."))
                near = hint(said, dict.fromkeys(part for part in parts if part != said))
                yield (
                    f"`{key}` must name linear layers or experts of the model, but {said!r} {why}.{near} "
                    "`adapter.target_modules=all-linear` means all of them."
                )

    def apply(self, model: Any) -> None:
        from txtrain.model.lora import attach, matrices

        scaling = self.config.scaling
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.keeps(name))
        whole = [name for name in model.state_dict() if self.keeps(name)]
        ranks = {name: (r, scaling) for name in matrices(model) if (r := self.rank(name))}
        attach(model, ranks, self.config.lora_dropout, whole)


def parent_of(name: str) -> str:
    """The module of a parameter, or of a module."""
    return name.rpartition(".")[0]


def adaptable(model: ModelConfig) -> dict[str, Row]:
    """The modules of transformers' class that hold matrices of ours, and its stacks of experts, by their name there;
    none if no class equals the model."""
    from txtrain.hf.registry import class_of  # with all families: not for a run without an adapter

    try:
        hf = class_of(model)
    except ConfigError:
        return {}
    named = [row for row in hf.rows if EXPERT not in row.theirs and not row.spare]
    return {respelt(row.theirs, hf.modules): row for row in by_layer([*named, *hf.stacks], model)}

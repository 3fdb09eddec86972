"""PEFT's folder of an adapter, in and out: adapter_config.json and adapter_model.safetensors.

Where transformers has one matrix for several of ours (GPT-2's c_attn), theirs has the sum of the ranks, and B is block
diagonal. Its stacked experts are adapted as parameters (`target_parameters`), with rank and expert in one dimension:
A [E R, I] and B [O, R E].
"""

# I inputs, O outputs, R rank, E experts

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from txtrain.errors import ConfigError
from txtrain.ground import files, plain_files
from txtrain.hf.folder import member
from txtrain.hf.hf_class import HFClass
from txtrain.hf.lora_config import ADAPTER_CONFIG, CLASSES, PREFIX, WEIGHTS, adaptable, parent_of
from txtrain.hf.modules_to_save import from_peft, outermost, spelt, to_peft
from txtrain.hf.name_map import EXPERT, Row, Shape
from txtrain.hf.registry import class_of
from txtrain.hf.tensor_file import DTYPES, SafetensorsFile, write_safetensors
from txtrain.model.config import ModelConfig
from txtrain.model.lora import Pair

_NESTED = ".base_layer"
HASH = "base_sha256"  # in the header of WEIGHTS
# Of patterns: no others are run, for they could take forever, as could more than two parts of any length.
_PLAIN = re.compile(r"(?:[\w.^$-]|\\[.dw])*(?:(?:\.\*|\\[.dw]\+)(?:[\w.^$-]|\\[.dw])*){0,2}")
_KEY = re.compile(r"(.+)\.lora_(A|B)\.weight")

# Fields of PEFT's LoraConfig that do not change a forward; any other that is not read here must be unset.
_HARMLESS = frozenset(
    "peft_type peft_version task_type inference_mode revision auto_mapping base_model_name_or_path fan_in_fan_out "
    "init_lora_weights layers_pattern layers_to_transform exclude_modules megatron_core qalora_group_size "
    "lora_dropout target_modules modules_to_save ensure_weight_tying runtime_config".split()
)
# Initial values that change the base's weights too.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "eva", "lora_ga", "mica")


class Kind(NamedTuple):
    """A module or a stack of experts of theirs, with the shapes of our matrices in it."""

    row: Row
    shapes: tuple[Shape, ...]

    @property
    def stacked(self) -> bool:
        return len(self.shapes[0]) == 3


def _kinds(model: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, Kind]:
    """What can be adapted, by their name. shapes: of our parameters, by name."""
    found = {}
    for module, row in adaptable(model).items():
        held = [shapes.get(ours, shapes.get(f"{ours}.weight", ())) for ours in row.ours]
        if all(len(shape) in (2, 3) for shape in held):
            found[module] = Kind(row, tuple(held))
    return found


# ------------------------------------------------------------------------------------------------------------------ out


def save_adapter(
    adapter: Mapping[str, Pair], model: ModelConfig, shapes: Mapping[str, Shape], folder: Path, base: str,
    sha256: str = "", rslora: bool = False, dropout: float = 0.0, whole: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write the two files.

    Args:
        shapes: of the model's parameters, by name.
        base: path or name of the base, for PEFT. sha256: of its weights.
        rslora: whether scaling is lora_alpha / sqrt(r).
        whole: parameters and buffers, by name, that are saved as they are.

    Raises:
        ConfigError: no class of transformers equals the model, or has a module for each of `whole`.
    """
    hf = class_of(model)
    tensors: dict[str, Tensor] = {}
    settings: dict[str, tuple[int, float]] = {}  # rank and lora_alpha, by the name that PEFT compares with its patterns
    modules, parameters, kinds = list[str](), list[str](), _kinds(model, shapes)
    own = _own_names(hf)
    written = set[str]()
    for theirs, kind in kinds.items():
        parts = [adapter.get(ours) for ours in kind.row.ours]
        there = [pair for pair in parts if pair is not None]
        if not there:
            continue
        written.update(kind.row.ours)
        A, B, scaling = _joined(kind, parts, model)
        r = A.shape[-2]
        key, place = (theirs, theirs) if not kind.stacked else (theirs, theirs.rpartition(".")[0])
        if kind.stacked:
            later = [name for name in _after(theirs, kinds) if any(ours in adapter for ours in kinds[name].row.ours)]
            place += _NESTED * len(later)
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
            parameters.append(theirs)
        elif theirs.rpartition(".")[2] in own:  # PEFT would take the module for one of the experts
            key = f"{theirs}.weight"
            parameters.append(key)
        else:
            modules.append(theirs)
        settings[key] = r, _whole(scaling * (math.sqrt(r) if rslora else r))
        for kind_of, factor in (("A", A), ("B", B)):
            tensors[f"{PREFIX}{place}.lora_{kind_of}.weight"] = factor.contiguous()
    if lost := sorted(adapter.keys() - written):
        warnings.warn(f"{hf.architecture} has no place for {lost[0]}: its adapter is left out.", stacklevel=2)
    saved = to_peft(whole, model, shapes)
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in saved.items()}
    (r, alpha), _ = Counter(settings.values()).most_common(1)[0]
    known = [name if kind.stacked else f"{name}.weight" for name, kind in kinds.items()]
    patterns = {
        end: both for both in dict.fromkeys(settings.values()) if both != (r, alpha)
        for end in _ends((key for key, value in settings.items() if value == both), settings)
    }
    config = {
        "peft_type": "LORA", "task_type": _task(model), "base_model_name_or_path": base, "inference_mode": True,
        "r": r, "lora_alpha": alpha, "lora_dropout": 0.0 if parameters else dropout, "use_rslora": rslora,
        "target_modules": _ends(modules, kinds), "target_parameters": _ends(parameters, known) or None,
        "rank_pattern": {end: n for end, (n, _) in patterns.items() if n != r},
        "alpha_pattern": {end: a for end, (_, a) in patterns.items() if a != alpha},
        "fan_in_fan_out": any(kinds[name].row.transposed for name in modules), "bias": "none",
        "init_lora_weights": True, "modules_to_save": outermost(map(parent_of, saved)) or None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
    made = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    said = {HASH: sha256} if sha256 else {}
    if model.head.pools:
        said[CLASSES] = json.dumps({"label_names": model.head.label_names, "kind": model.head.kind})
    write_safetensors(folder / WEIGHTS, made, {name: t.dtype for name, t in tensors.items()}, tensors.__getitem__, said)


def _joined(kind: Kind, parts: list[Pair | None], model: ModelConfig) -> tuple[Tensor, Tensor, float]:
    """One adapter for the matrices that theirs joins; those without one get zeros."""
    there = [pair for pair in parts if pair is not None]
    A = torch.cat([pair.A for pair in there], dim=-2)
    rows, experts = sum(shape[-2] for shape in kind.shapes), kind.shapes[0][:-2]
    B = A.new_zeros(*experts, rows, A.shape[-2])
    row = rank = 0
    for pair, shape in zip(parts, kind.shapes, strict=True):
        if pair is not None:
            r = pair.A.shape[-2]
            # All share a scaling, unless they come from elsewhere.
            B[..., row : row + shape[-2], rank : rank + r] = pair.B * (pair.scaling / there[0].scaling)
            rank += r
        row += shape[-2]
    return A, B if kind.row.order is None else B[kind.row.order(model)], there[0].scaling


def _after(theirs: str, kinds: Mapping[str, Kind]) -> list[str]:
    """Stacks of the same module that PEFT wraps later, in the order of its parameters."""
    stacks = [name for name, kind in kinds.items() if kind.stacked and parent_of(name) == parent_of(theirs)]
    return stacks[stacks.index(theirs) + 1 :]


def _own_names(hf: HFClass) -> set[str]:
    """Last names of each expert's own modules in the files of a class that stacks them."""
    return {row.theirs.removesuffix(".weight").rpartition(".")[2] for row in hf.rows if EXPERT in row.theirs}


def _ends(chosen: Iterable[str], known: Iterable[str]) -> list[str]:
    """The shortest ends of names that mean the chosen ones of all those known."""
    wanted, every = set(chosen), set(known)

    def end(name: str) -> str:
        parts = name.split(".")
        shorter = (".".join(parts[i:]) for i in reversed(range(len(parts))))
        return next(s for s in shorter if all(n in wanted for n in every if f".{n}".endswith(f".{s}")))

    return sorted({end(name) for name in wanted})


def _whole(x: float) -> float:
    return round(x) if abs(x - round(x)) < 1e-9 else x


def _task(model: ModelConfig) -> str | None:
    if model.head.pools:
        return "SEQ_CLS" if model.vocab_size else None
    if model.topology == "encoder_decoder":
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if model.topology == "decoder" else None


# ------------------------------------------------------------------------------------------------------------------- in


class AdapterFolder:
    """PEFT's folder, its settings checked; nothing in it is run.

    Attributes:
        base: base_model_name_or_path. sha256: of the base's weights, if we wrote the folder.

    Raises:
        ConfigError: it holds no LoRA adapter, or one of a kind that changes the numbers in another way.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config, weights = member(folder, ADAPTER_CONFIG), member(folder, WEIGHTS)
        if config is None or weights is None:
            raise ConfigError(f"{folder} must hold {ADAPTER_CONFIG} and {WEIGHTS}, but does not hold both.")
        self.given = given = plain_files.read_json(config)
        where = str(config)
        plain_files.check_keys(given, where, {
            "r": int | None, "lora_alpha": float | None, "rank_pattern": dict | None, "alpha_pattern": dict | None,
            "target_parameters": list[str] | None, "base_model_name_or_path": str | None, "use_rslora": bool | None,
            "modules_to_save": list[str] | None,
        })
        problems = [f"`peft_type` must be LORA, but is {given.get('peft_type')!r} instead."] * (
            given.get("peft_type") != "LORA"
        )
        read = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters"}
        for name, value in given.items():
            if name not in read | _HARMLESS and value not in (None, False, [], {}, "none"):
                problems.append(f"`{name}` must be unset, but is {str(value)[:80]!r} instead: it changes the numbers.")
        start = str(given.get("init_lora_weights")).lower()
        if start.startswith(_CHANGES_BASE):
            problems.append(f"`init_lora_weights` must not be {start}: it changes the base's weights too.")
        if problems:
            raise ConfigError(*(f"{where}: {problem}" for problem in problems))
        self.base: str | None = given.get("base_model_name_or_path")
        self._file = SafetensorsFile(weights)
        said = self._file.metadata if isinstance(self._file.metadata, dict) else {}
        self.sha256 = str(said.get(HASH, ""))

    def read(self, model: ModelConfig, shapes: Mapping[str, Shape]) -> tuple[dict[str, Pair], dict[str, Tensor]]:
        """The adapter by our matrices, in float32, and what is trained whole, by our names. shapes: of the model's
        parameters and buffers, by name.

        Raises:
            ConfigError: it is of another model.
        """
        hf = class_of(model)
        kinds, found = _kinds(model, shapes), dict[str, dict[str, str]]()
        others = list[str]()
        for name in self._file.entries:
            key = _KEY.fullmatch(name.removeprefix(PREFIX))
            if key is None:
                others.append(name)
                continue
            theirs = self._named(key[1], kinds, hf)
            if (first := found.setdefault(theirs, {}).setdefault(key[2], name)) != name:
                raise ConfigError(f"{self._file.path} must hold one adapter of {theirs}, but holds {first} and {name}.")
        adapter: dict[str, Pair] = {}
        for theirs, both in found.items():
            if both.keys() != {"A", "B"}:
                raise ConfigError(f"{self._file.path} must hold lora_A and lora_B of {theirs}, but holds one of them.")
            adapter |= self._split(theirs, kinds[theirs], both, model)
        if not adapter:
            raise ConfigError(f"{self._file.path} must hold an adapter, but holds no tensors.")
        return adapter, from_peft(self._file, others, model, shapes)

    def _named(self, place: str, kinds: Mapping[str, Kind], hf: HFClass) -> str:
        """Their name of what is adapted at that place in PEFT's model."""
        depth, plain = place.count(_NESTED), place.replace(_NESTED, "")
        for module in (name.removesuffix(".") for name in spelt(f"{plain}.", hf)):
            if module in kinds and not kinds[module].stacked and not depth:
                return module
            ends = self.given.get("target_parameters") or []
            stacks = [
                name for name, kind in kinds.items() if kind.stacked and parent_of(name) == module
                and any(f".{name}".endswith(f".{end}") for end in ends)
            ]
            if depth < len(stacks):
                return stacks[len(stacks) - 1 - depth]
        raise ConfigError(f"{self._file.path} is of another model: {hf.architecture} has no module {plain}.")

    def _split(self, theirs: str, kind: Kind, names: Mapping[str, str], model: ModelConfig) -> dict[str, Pair]:
        """names: of the factors A and B, which are read once their shapes and dtypes are known to fit."""
        rows, columns = sum(shape[-2] for shape in kind.shapes), kind.shapes[0][-1]
        n = kind.shapes[0][0] if kind.stacked else 1
        (a, kind_a), (b, kind_b) = (self._file.entries[names[factor]] for factor in "AB")
        r = a[0] // n if len(a) == 2 else 0
        if not r or a != (r * n, columns) or b != (rows, r * n):
            wanted = f"lora_A [{r * n}, {columns}] and lora_B [{rows}, {r * n}]"
            raise ConfigError(
                f"{self._file.path} is of another model: {theirs} must have {wanted}, but has {list(a)} and {list(b)}."
            )
        if not {kind_a, kind_b} <= DTYPES.keys():
            allowed = f"{', '.join(DTYPES)}, but is {kind_a} and {kind_b} instead"
            raise ConfigError(f"{self._file.path}: the dtype of {theirs} must be one of {allowed}.")
        A, B = (self._file.read(names[factor]).float() for factor in "AB")
        key = theirs if kind.stacked or not self._is_parameter(theirs) else f"{theirs}.weight"
        alpha = self._setting("alpha_pattern", key, self.given.get("lora_alpha"), 8)
        scaling = alpha / (math.sqrt(r) if self.given.get("use_rslora") else r)
        if kind.stacked:
            A, B = A.view(n, r, columns), B.view(rows, r, n).permute(2, 0, 1)
        if kind.row.order is not None:
            B = B[torch.tensor(kind.row.order(model)).argsort()]
        parts = torch.split(B, [shape[-2] for shape in kind.shapes], dim=-2)
        return {
            ours: Pair(A, part.contiguous(), scaling) for ours, part in zip(kind.row.ours, parts, strict=True)
        }

    def _is_parameter(self, theirs: str) -> bool:
        ends = self.given.get("target_parameters") or []
        return any(f".{theirs}.weight".endswith(f".{end}") for end in ends)

    def _setting(self, patterns: str, key: str, general: Any, default: float) -> float:
        """As PEFT chooses it: by the first pattern that ends the name."""
        for pattern, value in (self.given.get(patterns) or {}).items():
            if not _PLAIN.fullmatch(pattern) or type(value) not in (int, float):
                what = f"numbers by names of modules, but has {pattern!r}: {str(value)[:40]} instead"
                raise ConfigError(f"{self.folder / ADAPTER_CONFIG}: `{patterns}` must hold {what}.")
            if re.match(rf"(.*\.)?({pattern})$", key):
                return float(value)
        return float(default if general is None else general)

"""The known classes of transformers, and which of them a model equals. No torch."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from txtrain.errors import ConfigError, hint
from txtrain.ground.plain_files import read_json
from txtrain.hf import families, generation_config
from txtrain.hf.folder import member
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import respelt
from txtrain.hf.tensor_names import tensor_names
from txtrain.model.config import ModelConfig

if TYPE_CHECKING:
    from txtrain.hf.weights import Weights

# The public classes of the modules of families/, a base before what derives from it.
_MODULES = [importlib.import_module(f"{families.__name__}.{m.name}") for m in pkgutil.iter_modules(families.__path__)]
_PUBLIC = [c for m in _MODULES for name, c in vars(m).items() if isinstance(c, HFClass) and not name.startswith("_")]
CLASSES: tuple[HFClass, ...] = tuple({id(c): c for c in _PUBLIC}.values())
CONFIG = "config.json"


def read_config(folder: Path, weights: Weights | None = None) -> tuple[HFClass, ModelConfig]:
    """The class of a folder, and the model of its config.json, with the end tokens of its generation_config.json.

    weights: the folder's, opened. None: without torch; what only a pickle knows is then taken from config.json.

    Raises:
        ConfigError: there is no config.json, or a field in it is not supported.
    """
    path = member(folder, CONFIG)
    if path is None:
        raise ConfigError(f"{folder} must hold a {CONFIG}, but does not.")
    given = read_json(path)
    known = dict.fromkeys(c.model_type for c in CLASSES)
    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        given_kind = f"{', '.join(known)}, but is {kind!r} instead"
        raise ConfigError(f"{path}: `model_type` must be one of {given_kind}.{hint(kind, known)}")
    candidates = [c for c in CLASSES if c.model_type == kind and c.is_of(given)]
    try:
        candidates[0].read(given)  # its errors come before any tensor is read
        hf, model = _by_tensors(candidates, given, folder, weights)
    except ConfigError as e:
        raise ConfigError(*(f"{path}: {problem}" for problem in e.problems)) from e
    return hf, generation_config.with_ends(model, generation_config.read(folder), str(folder / generation_config.FILE))


def _by_tensors(
    candidates: list[HFClass], given: dict[str, Any], folder: Path, weights: Weights | None
) -> tuple[HFClass, ModelConfig]:
    names = tensor_names(folder) if weights is None else weights.entries().keys()
    if names is None:
        said = given.get("architectures")
        hf = next((c for c in candidates if isinstance(said, list) and c.architecture in said), candidates[0])
        return hf, hf.read(given)
    spelt = {respelt(name, candidates[0].renamed) for name in names}
    hf = next((c for c in candidates if c.marker in spelt), _unmarked(candidates))
    return hf, hf.read(hf.settled(given, spelt, (lambda a, b: False) if weights is None else weights.same))


def _unmarked(candidates: list[HFClass]) -> HFClass:
    return next((c for c in candidates if c.marker is None), candidates[-1])


def class_of(model: ModelConfig) -> HFClass:
    """The class whose logits equal this model's; of several, that of its family.

    Raises:
        ConfigError: there is none; it says how the model differs from the nearest.
    """
    against = [(c, c.reasons_against(model)) for c in CLASSES]
    equal = [c for c, reasons in against if not reasons]
    if equal:
        return next((c for c in equal if c.family == model.family), equal[0])
    nearest, reasons = min(against, key=lambda pair: _distance(model, *pair))
    near = f"Nearest: {nearest.architecture}, but {'; '.join(reasons)}."
    raise ConfigError(f"`model` must equal a class of transformers to be saved as one, but equals none. {near}")


def _distance(model: ModelConfig, hf: HFClass, reasons: list[str]) -> tuple[bool, int, bool, int]:
    """How far a model is from a class: other kinds of parts count before other values."""
    other_topology = hf.fixed.get("topology", "decoder") != model.topology
    return other_topology, len(hf.other_kinds(model)), hf.family != model.family, len(reasons)

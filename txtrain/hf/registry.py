"""The classes of transformers that are known, and which of them a model equals. No torch."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from txtrain.errors import ConfigError, hint
from txtrain.ground.plain_files import read_json
from txtrain.hf import families
from txtrain.hf.folder import member
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import respelt
from txtrain.hf.tensor_names import tensor_names
from txtrain.model.config import ModelConfig

if TYPE_CHECKING:
    from txtrain.hf.weights import Weights

# What the modules of families/ define; a class that one derives from stands before it.
_MODULES = [importlib.import_module(f"{families.__name__}.{m.name}") for m in pkgutil.iter_modules(families.__path__)]
_DEFINED = {id(c): c for module in _MODULES for c in vars(module).values() if isinstance(c, HFClass)}
CLASSES: tuple[HFClass, ...] = tuple(_DEFINED.values())
CONFIG = "config.json"


def read_config(folder: Path, weights: Weights | None = None) -> tuple[HFClass, ModelConfig]:
    """The class that a folder is of, and the model that its config.json describes.

    weights: the folder's, opened. None: as far as it can be told without torch; only what a pickle knows of a head is then taken from
        config.json.

    Raises:
        ConfigError: there is no config.json, or something in it is not supported, by name.
    """
    path = member(folder, CONFIG)
    if path is None:
        raise ConfigError(f"{folder} must hold a {CONFIG}, but does not.")
    given = read_json(path)
    known = dict.fromkeys(c.model_type for c in CLASSES)
    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(f"{path}: `model_type` must be one of {', '.join(known)}, but is {kind!r} instead.{hint(kind, known)}")
    candidates = [c for c in CLASSES if c.model_type == kind and c.is_of(given)]
    try:
        candidates[0].read(given)  # what is wrong with it is said before any tensor is looked at
        return _told_by_tensors(candidates, given, folder, weights)
    except ConfigError as e:
        raise ConfigError(*(f"{path}: {problem}" for problem in e.problems)) from e


def _told_by_tensors(candidates: list[HFClass], given: dict[str, Any], folder: Path, weights: Weights | None) -> tuple[HFClass, ModelConfig]:
    names = tensor_names(folder) if weights is None else weights.entries().keys()
    if names is None:
        said = given.get("architectures")
        hf = next((c for c in candidates if isinstance(said, list) and c.architecture in said), candidates[0])
        return hf, hf.read(given)
    spelt = {respelt(name, candidates[0].renamed) for name in names}
    hf = next((c for c in candidates if c.marker in spelt), candidates[-1])
    return hf, hf.read(hf.settled(given, spelt, (lambda a, b: False) if weights is None else weights.same))


def label_names(folder: Path) -> tuple[str, ...]:
    """What config.json calls the classes, in their order; none where it does not, or not each of them."""
    path = member(folder, CONFIG)
    names = None if path is None else read_json(path).get("id2label")
    if not isinstance(names, dict):
        return ()
    found: list[Any] = [names.get(str(i)) for i in range(len(names))]
    return tuple(found) if all(isinstance(name, str) for name in found) else ()


def class_of(model: ModelConfig) -> HFClass:
    """The class whose logits equal this model's, whatever its family is called; the label only decides among several that do.

    Raises:
        ConfigError: there is none; says what differs from the nearest.
    """
    against = [(c, c.reasons_against(model)) for c in CLASSES]
    equal = [c for c, reasons in against if not reasons]
    if equal:
        return next((c for c in equal if c.family == model.family), equal[0])
    nearest, reasons = min(against, key=lambda pair: _distance(model, *pair))
    raise ConfigError(
        f"`model` must equal a class of transformers to be saved as one, but equals none. Nearest: {nearest.architecture}, but {'; '.join(reasons)}."
    )


def _distance(model: ModelConfig, hf: HFClass, reasons: list[str]) -> tuple[bool, int, bool, int]:
    """How far a model is from a class that it does not equal: what is of another kind counts before what has another value."""
    return hf.fixed.get("topology", "decoder") != model.topology, len(hf.other_kinds(model)), hf.family != model.family, len(reasons)

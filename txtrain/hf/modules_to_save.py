"""PEFT's `modules_to_save`: what is trained whole beside an adapter, under transformers' names, out and in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from txtrain.errors import ConfigError
from txtrain.hf.hf_class import HFClass
from txtrain.hf.lora_config import PREFIX, adaptable, parent_of
from txtrain.hf.name_map import Shape, Stored, linear, respelt, stored_of
from txtrain.hf.registry import class_of
from txtrain.hf.tensor_file import DTYPES, SafetensorsFile
from txtrain.hf.tensor_layout import to_ours, to_theirs
from txtrain.model.config import ModelConfig

_TABLE = "embedding.token.weight"


def to_peft(whole: Mapping[str, Tensor], model: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The tensors by their names: all of each module that holds one.

    Args:
        whole: parameters and buffers, by our names. shapes: of all of them.

    Raises:
        ConfigError: transformers' class has no such module, a part of one is trained, or PEFT would part what is tied.
    """

    def refused(name: str, why: str) -> ConfigError:
        return ConfigError(f"`merge_adapter` must be true where {name} is trained whole, but is false instead: {why}.")

    every, output = _stored(model, shapes), _output(model)
    places = {part: stored.name for stored in every.values() for part in stored.parts}
    tied = model.tie_word_embeddings and model.head.writes
    for name in whole:
        if not parent_of(places.get(name, "")):
            raise refused(name, "transformers' class has no place for it")
        if (name == _TABLE and model.topology == "encoder_decoder") or (
            tied and output is None and (name == _TABLE or name.startswith("head."))
        ):
            raise refused(name, "PEFT would part it from what is tied to it")
    modules = {f"{parent_of(places[name])}." for name in whole}
    found = {name: stored for name, stored in every.items() if name.startswith(tuple(modules))}
    if lost := [part for stored in found.values() for part in stored.parts if part not in whole]:
        why = f"PEFT saves whole modules, and adapter.modules_to_save lacks {lost[0]}"
        raise refused(f"a part of {parent_of(places[lost[0]])} alone", why)
    saved = {name: to_theirs(stored, whole).contiguous() for name, stored in found.items()}
    if tied and _TABLE in whole:
        assert output is not None
        saved[output] = whole[_TABLE].clone()  # for PEFT a module of its own: it ties those of a few names only
    return saved


def from_peft(
    file: SafetensorsFile, names: Iterable[str], model: ModelConfig, shapes: Mapping[str, Shape]
) -> dict[str, Tensor]:
    """The other way. names: of tensors in the file.

    Raises:
        ConfigError: one of them is of another model, or tied embeddings were trained apart.
    """
    hf = class_of(model)
    every, found, tied = _stored(model, shapes), dict[str, Tensor](), dict[str, Tensor]()
    output = _output(model) if model.tie_word_embeddings and _TABLE in shapes else None
    for name in names:
        spellings = spelt(name.removeprefix(PREFIX), hf)
        stored = next((every[known] for known in spellings if known in every), None)
        if stored is None and output not in spellings:
            raise ConfigError(f"{file.path} must hold a LoRA adapter of {hf.architecture}, but holds {name}.")
        shape, dtype = file.entries[name]
        wanted = shapes[_TABLE] if stored is None else stored.shape
        if shape != wanted:
            there = f"{name} must be {list(wanted)}, but is {list(shape)}"
            raise ConfigError(f"{file.path} is of another model: {there}.")
        if dtype not in DTYPES:
            raise ConfigError(f"{file.path}: the dtype of {name} must be one of {', '.join(DTYPES)}.")
        values = file.read(name).float()
        if stored is None:
            tied[name] = values
        else:
            found |= to_ours(stored, values, shapes)
    if output is not None and (tied or _TABLE in found):
        table = found.get(_TABLE)
        if table is None or not all(values.equal(table) for values in tied.values()) or not tied:
            raise ConfigError(
                f"{file.path} must hold equal input and output embeddings of a model that ties them, but "
                "they were trained apart. For PEFT: modules_to_save with the embedding, and ensure_weight_tying."
            )
    return found


def outermost(modules: Iterable[str]) -> list[str]:
    """Those that lie in none of the others."""
    every = set(modules)
    return sorted(name for name in every if not name.startswith(tuple(f"{other}." for other in every)))


def spelt(name: str, hf: HFClass) -> list[str]:
    """How a name in PEFT's file, MODULE.PARAMETER or MODULE., may be spelt in transformers' class."""
    split = [respelt(given, hf.renamed).rpartition(".") for given in (name, hf.base + name)]
    return [f"{respelt(module, hf.modules)}.{parameter}" for module, _, parameter in split]


def _stored(model: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, Stored]:
    """The tensors of transformers' modules, by their names there. shapes: of ours."""
    rows = adaptable(model).items()
    found = [s for theirs, row in rows for s in stored_of(row._replace(theirs=theirs), model, shapes)]
    return {stored.name: stored for stored in found}


def _output(model: ModelConfig) -> str | None:
    """Their name of a tied output matrix that is a module of its own."""
    return next((f"{row.theirs}.weight" for row in class_of(model).rows if row == linear("lm_head", "head")), None)

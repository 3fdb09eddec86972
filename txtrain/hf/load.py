"""A Hugging Face folder to a Transformer: all is checked before memory is allocated; tensors load one by one."""

from __future__ import annotations

import dataclasses as dc
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from txtrain.errors import ConfigError, hint
from txtrain.hf import generation_config
from txtrain.hf.folder import checked, contents, tokenizer_files
from txtrain.hf.hf_class import HFClass
from txtrain.hf.name_map import Stored, n_elements
from txtrain.hf.pieces import Source
from txtrain.hf.registry import CONFIG, read_config
from txtrain.hf.tensor_file import DTYPES, Entry
from txtrain.hf.tensor_layout import from_theirs, tensors_of
from txtrain.hf.tensor_names import check_layers
from txtrain.hf.trainer import build_model
from txtrain.hf.weights import Weights
from txtrain.model.config import ModelConfig
from txtrain.model.shapes_only import shapes_only
from txtrain.model.transformer import Transformer

EMBEDDING, HEAD = "embedding.token.weight", "head.weight"
_HEADS = ("lm_head.weight", "predictions.decoder.weight")
_SHOWN = 3  # names in a message
_SINUSOID_TOLERANCE = 2e-3  # for float16, and for the angles of far positions


def load_pretrained(folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Transformer:
    """The model of a Hugging Face folder, on the default device, in eval mode.

    Args:
        dtype: of the parameters; None: torch's default, whatever the files have.

    Raises:
        ConfigError: as `open_folder`.
    """
    return open_folder(folder).load(torch.get_default_device(), dtype)


def open_folder(folder: str | os.PathLike[str]) -> Source:
    """The model of a Hugging Face folder. No code of the folder runs; only tensors are unpickled.

    Raises:
        ConfigError: the folder is of no known class, its config has an unsupported field that would change the numbers,
            or its files do not hold exactly the model's tensors.
    """
    folder = checked(folder)
    hf, _ = read_config(folder)
    weights = Weights(folder)
    if hf.base:
        weights.add_prefix(hf.base, but=hf.rows[-1].theirs)
    weights.rename(hf.renamed)
    hf, config = read_config(folder, weights)
    entries = weights.entries()
    check_layers(config, frozenset(entries), f"{folder}: {CONFIG}")  # a config may claim any size, the files cannot
    held = sum(n_elements(entry.shape) for entry in entries.values())
    if (n := config.n_params) > held:
        sizes = f"a model of {n:,} parameters, but the files hold {held:,} numbers"
        raise ConfigError(f"{folder}: {CONFIG} describes {sizes}.")
    with shapes_only():
        model = build_model(config)
    ours = {name: tuple(t.shape) for name, t in tensors_of(model).items()}
    every = hf.stored(config, ours)
    stored = _without_spares(every, entries)
    copies = _copies(hf, config, stored, entries)
    _check_tensors(hf, stored, entries, folder, config, known={*copies, *(s.name for s in every)})
    _check_values(hf, model, copies, weights, folder)
    model.tokenizer_files = tokenizer_files(folder)
    given = generation_config.read(folder)
    where = str(folder / (generation_config.FILE if given else CONFIG))
    model.generation_file = given or generation_config.of_model(contents(folder, CONFIG)[CONFIG], where)
    model.banned_tokens = generation_config.banned(config, model.generation_file, where)
    model.loss_type = hf.loss_type
    return Source(folder, model, [piece for s in stored for piece in from_theirs(s, weights, ours)])


def _without_spares(stored: list[Stored], entries: Mapping[str, Entry]) -> list[Stored]:
    """Of two names for one of ours, the one to read."""
    there = {s.parts for s in stored if not s.spare and s.name in entries}
    spared = {s.parts for s in stored if s.spare and s.name in entries} - there
    return [s for s in stored if s.spare == (s.parts in spared)]


def _copies(hf: HFClass, config: ModelConfig, stored: list[Stored], entries: Mapping[str, Entry]) -> dict[str, str]:
    """Second names in the folder -> first names: the tied head's, and the class's."""
    copies = dict(hf.copies)
    if config.tie_word_embeddings and any(row.ours[0] in ("head", HEAD) for row in hf.rows):
        copies[_weight(hf, HEAD, dc.replace(config, tie_word_embeddings=False))] = _weight(hf, EMBEDDING, config)
    wanted = {s.name for s in stored}
    return {name: of for name, of in copies.items() if name in entries and name not in wanted and of in wanted}


def _check_tensors(
    hf: HFClass, stored: list[Stored], entries: Mapping[str, Entry], folder: Path, config: ModelConfig,
    known: Collection[str],
) -> None:
    wanted = {s.name: s.shape for s in stored}
    unread = "|".join((hf.buffers.replace("{n_layers}", str(config.n_layers)), hf.sinusoids))
    problems = []
    if missing := [name for name in wanted if name not in entries]:
        near = hint(missing[0], entries.keys() - wanted.keys())
        problems.append(f"{folder} must hold {_listed(missing)}, but does not.{near}")
    extra = [name for name in entries if name not in wanted and name not in known and not re.fullmatch(unread, name)]
    if extra:
        problems.append(f"{folder} must hold only tensors of {hf.architecture}, but holds {_listed(extra)}.")
    for name, shape in wanted.items():
        entry = entries.get(name)
        if entry is not None and entry.shape != shape:
            problems.append(f"{folder}: {name} must be {list(shape)}, but is {list(entry.shape)} instead.")
        elif entry is not None and entry.dtype not in DTYPES:
            problems.append(f"{folder}: {name} must be one of {', '.join(DTYPES)}, but is {entry.dtype} instead.")
    if problems:
        raise ConfigError(*problems[:_SHOWN])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _weight(hf: HFClass, ours: str, config: ModelConfig) -> str:
    """Their name for one of our weights."""
    module = ours.removesuffix(".weight")
    row = next(row for row in hf.rows if (module in row.ours or ours in row.ours) and row.when(config))
    return row.theirs if ours in row.ours else f"{row.theirs}.weight"


def _check_values(
    hf: HFClass, model: Transformer, copies: Mapping[str, str], weights: Weights, folder: Path
) -> None:
    """Second names must hold equal tensors, and position tables the sines and cosines that are computed here."""
    for name, of in copies.items():
        if not weights.same(name, of):
            nearest = f" Nearest: set tie_word_embeddings to false in {CONFIG}." if name.endswith(_HEADS) else ""
            raise ConfigError(f"{folder}: {name} must equal {of}, as {CONFIG} says, but does not.{nearest}")
    for name, entry in weights.entries().items():
        if re.fullmatch(hf.sinusoids, name):
            right = entry.dtype in DTYPES and len(entry.shape) == 2 and entry.shape[1] == model.config.dim
            if right:
                table = weights.read(name).float()
                ids = torch.arange(len(table), device="cpu")[None]
                waves = model.position.add(torch.zeros(1, *table.shape, device="cpu"), ids)[0]
                right = torch.allclose(waves, table, atol=_SINUSOID_TOLERANCE)
            if not right:
                raise ConfigError(f"{folder}: {name} must be the sines and cosines of its positions, but is not.")

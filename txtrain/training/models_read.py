"""Further models that an objective reads, and the weights with which the run began."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from txtrain.checkpoint.base import resolve
from txtrain.checkpoint.described import describe
from txtrain.checkpoint.load import open_weights
from txtrain.config.schema import Train
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.errors import ConfigError
from txtrain.hf.fit import fitted
from txtrain.hf.pieces import Source, piece_of
from txtrain.model.transformer import Transformer
from txtrain.parallel.one_process import OneProcess
from txtrain.training.opened import opened_alike


def models_read(config: Train, parallel: OneProcess) -> dict[str, Source]:
    """The models that the objective reads, on all ranks the same; each rank checks a part of their values.

    Raises:
        ConfigError: one of them cannot be read.
    """

    def source_of(key: str, where: str) -> Source:
        how = (key, True, *parallel.world[:2])
        return opened_alike(parallel, lambda: resolve(where, key), lambda path: open_weights(path, *how), str)[0]

    return {key: source_of(f"objective.{key}", where) for key, where in config.objective.models.items()}


def start_of(
    config: Train, model: nn.Module, parallel: OneProcess, weights: Source | None,
    began: Mapping[str, Any] | None = None,
) -> Source:
    """The weights with which the run begins, or began.

    Args:
        model: the trained one, before it is laid over the ranks.
        weights: those of init_from; None if a checkpoint is continued.
        began: of a run that continues, the record of those weights: `init_from=RUN` may have newer ones by now.

    Raises:
        ConfigError: they cannot be read, or are others than those recorded.
    """
    tensors = model.state_dict()
    copy = described(config)
    assert isinstance(copy, Transformer)
    if not any(t.is_meta for t in tensors.values()):  # given in Python
        return Source(Path(), copy, [piece_of(name, t.detach().cpu().clone()) for name, t in tensors.items()])
    key, where = next(((k, w) for k in ("init_from", "fork") if (w := getattr(config, k)) is not None), ("", None))
    if where is None:
        return Source(Path(), copy, ())
    chosen = began["path"] if began else None if weights is None else str(weights.path)
    path = chosen or parallel.first(lambda: str(describe(where, key).path))
    found = open_weights(path, key, not config.allow_nonfinite, *parallel.world[:2])
    found, _ = fitted(found, copy, config.model, config.init_allow_missing)
    if began and parallel.first(found.identity) != began["sha256"]:
        raise ConfigError(
            f"`{key}` must be what the run began with, since its objective reads those weights, but {path} has "
            "changed since then."
        )
    return dc.replace(found, model=copy)


def check_vocabularies(config: Train, read: Mapping[str, Source]) -> None:
    """Raise a ConfigError if a model that the objective reads has another vocabulary, where it needs the same."""
    for key, source in read.items() if config.objective.same_tokenizer else ():
        if source.model.config.vocab_size != config.model.vocab_size:
            wanted = f"a model of {config.model.vocab_size} tokens, model.vocab_size"
            has = f"{config.objective.models[key]} has {source.model.config.vocab_size}"
            raise ConfigError(f"`objective.{key}` must be {wanted}, but {has}.")


def check_tokenizers(config: Train, tokenizer: Tokenizer | None) -> None:
    """Check the tokenizers of the models that the objective reads, where they have one. tokenizer: of the data.

    Raises:
        ConfigError: one has another vocabulary.
    """
    for key, where in config.objective.models.items() if config.objective.same_tokenizer else ():
        folder = describe(where, f"objective.{key}").tokenizer
        if tokenizer is None or folder is None:
            continue
        theirs, ours = (one.backend.get_vocab() for one in (load_tokenizer(folder), tokenizer))
        if theirs != ours:
            other = next((token for token in ours if theirs.get(token) != ours[token]), None)
            why = f"{len(theirs)} tokens, not {len(ours)}" if other is None else f"{other!r} is {theirs.get(other)}"
            raise ConfigError(
                f"`objective.{key}` must have the tokenizer of the data, but {where} has another: {why}. "
                f"Give data.tokenizer={folder}, if the student is to read as it does."
            )


def described(config: Train) -> nn.Module:
    """The model without storage: shapes only."""
    from txtrain.model.build import build_model
    from txtrain.model.shapes_only import shapes_only

    with shapes_only():
        return build_model(config.model)

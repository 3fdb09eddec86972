"""The weights that a run starts from: of init_from, or the base of its adapter."""

from __future__ import annotations

import dataclasses as dc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from txtrain.checkpoint.base import Base, identify, missing, read_base, resolve
from txtrain.checkpoint.load import open_base, open_weights, provenance
from txtrain.checkpoint.run_folder import RunFolder
from txtrain.config.schema import Train
from txtrain.errors import ConfigError
from txtrain.ground.plain_files import check_keys
from txtrain.hf import generation_config
from txtrain.hf.fit import Fit
from txtrain.hf.pieces import Source
from txtrain.model.transformer import Transformer
from txtrain.parallel.one_process import OneProcess
from txtrain.training.opened import opened_alike


def base_of(cfg: Train, place: RunFolder | None) -> Base | None:
    """What the run's adapter is added to; None if the run trains the model itself. A checkpoint's base may have moved:
    init_from says where it is now.

    Raises:
        ConfigError: a checkpoint was trained on another base, or holds no adapter.
    """
    if not cfg.adapter.alone:
        return None
    assert cfg.init_from is not None
    if place is None or (source := place.source) is None:
        return identify(cfg.init_from, "init_from")
    before = read_base(source)
    if before is None:
        raise ConfigError(
            f"`{place.key}` must be a run with an adapter, but {source} holds a whole model: init_from={source}."
        )
    if os.path.exists(before.path):  # never raises, whatever the file names
        return before
    return dc.replace(before, path=identify(cfg.init_from, "init_from").path)


@dc.dataclass(frozen=True)
class InitialWeights:
    """given: the value of init_from. origin: `provenance`."""

    source: Source
    given: str
    origin: Mapping[str, Any]

    def record(self, fit: Fit) -> dict[str, Any]:
        """What run.json says of them."""
        resized = {name: [list(shape) for shape in shapes] for name, shapes in fit.resized.items()}
        parts = {"loaded": list(fit.loaded), "skipped": list(fit.skipped), "initialised": list(fit.initialised)}
        return {"given": self.given, **self.origin, **parts, "resized": resized}


def initial_weights(
    cfg: Train, place: RunFolder | None, parallel: OneProcess, base: Base | None = None
) -> InitialWeights | None:
    """The weights of init_from; None for a run that continues: they are in its own checkpoint, unless that holds an
    adapter alone. base: the adapter's.

    All ranks open the same checkpoint; where a running training removes it meanwhile, the one that is the newest then.

    Raises:
        ConfigError: there are none, or they cannot be read.
    """
    given = cfg.init_from
    if given is None or (base is None and place is not None and place.source is not None):
        return None
    how = ("init_from", not cfg.allow_nonfinite, *parallel.world[:2])

    def newest() -> Path:
        if base is not None and not os.path.exists(base.path):
            raise missing(base, "init_from")
        return resolve(given, "init_from") if base is None else Path(base.path)

    def opened(where: Path) -> Source:
        return open_weights(where, *how) if base is None else open_base(base, *how)

    source, origin = opened_alike(parallel, newest, opened, provenance)
    return InitialWeights(source, given, origin)


def began_with(place: RunFolder | None) -> dict[str, str] | None:
    """What run.json says of the weights with which a run that continues began, if its objective reads them.

    Raises:
        ConfigError: the entry is damaged.
    """
    began = None if place is None or place.checkpoint is None else place.facts.get("starting_weights")
    check_keys({"starting_weights": began}, "run.json", {"starting_weights": dict[str, str] | None})
    if began is not None:
        check_keys(began, "run.json: starting_weights", {"path": str, "sha256": str})
    return began


def generation_file(model: nn.Module | None, weights: Source | None, source: Path | None) -> bytes:
    """The generation_config.json of the model that the run starts or goes on from."""
    if source is not None:
        return generation_config.read(source)
    start = model if weights is None else weights.model
    return start.generation_file if isinstance(start, Transformer) else b""


def banned_tokens(
    model: nn.Module | None, weights: Source | None, source: Path | None, config: Train
) -> tuple[int, ...]:
    """The tokens that it must not write: as `generation_file`. None where training reads what it writes: their
    probability is that of all tokens."""
    if config.objective.rollout(config) is not None:
        return ()
    if source is not None:
        said = generation_config.read(source), str(source / generation_config.FILE)
        return generation_config.banned(config.model, *said)
    start = model if weights is None else weights.model
    return start.banned_tokens if isinstance(start, Transformer) else ()

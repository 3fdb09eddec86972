"""The jobs of a command line as typed configurations."""

from __future__ import annotations

import dataclasses as dc
import os
from collections.abc import Sequence

from hydra.core.override_parser.types import Override

from txtrain.cli.verbs import VERBS, root_of
from txtrain.config import compose as composition
from txtrain.config.composed import Composed
from txtrain.config.loader import Loader, make_loader
from txtrain.config.of_checkpoint import of_checkpoint
from txtrain.config.overrides import expand
from txtrain.config.schema import Train
from txtrain.config.schema_of_trained import Evaluate, Export, Generate, OnTrained, Predict
from txtrain.errors import ConfigError
from txtrain.ground.files import path_of
from txtrain.run_config import RunConfig


def compose(
    overrides: Sequence[str] = (), verb: str = "train", config_dir: str | os.PathLike[str] | None = None
) -> Train | Evaluate | Predict | Generate | Export:
    """The typed, validated configuration that `txtrain VERB OVERRIDES` would run.

    Raises:
        ConfigError: as the command line would refuse it, with the same message.
    """
    listed = isinstance(overrides, Sequence) and not isinstance(overrides, str)
    if not listed or not all(isinstance(o, str) for o in overrides):
        raise ConfigError(f"`overrides` must be a list of strings like ['model=gpt2'], but is {overrides!r} instead.")
    if not isinstance(verb, str) or verb not in VERBS:
        raise ConfigError(f"`verb` must be one of {', '.join(VERBS)}, but is {verb!r} instead.")
    loader = make_loader(None if config_dir is None else str(path_of(config_dir, "config_dir")))
    job, _ = compose_job(verb, expand(overrides, False, loader)[0], loader)
    config: Train | Evaluate | Predict | Generate | Export = job.config
    return config


def compose_job(verb: str, overrides: list[Override], loader: Loader) -> tuple[Composed, list[Override]]:
    """The configuration of one job of `expand`, and its overrides as passed to Hydra."""
    job, lines = composition.compose_job(verb, root_of(verb), overrides, loader)
    return _on_trained(_pinned(job)), lines


def _pinned(composed: Composed) -> Composed:
    """The job with each folder of runs replaced by its newest run: one for all ranks and all members of a sweep.

    A run that is continued keeps the one that it was begun with.
    """
    config, found = composed.config, {}
    keys = (f.name for f in dc.fields(config) if f.metadata.get("run"))
    if not (given := {key: where for key in keys if (where := getattr(config, key)) is not None}):
        return composed
    from txtrain.checkpoint.format import newest_run
    from txtrain.checkpoint.run_folder import begun_with

    for key, where in given.items():
        of_runs = isinstance(config, RunConfig)
        before = begun_with(config.run_dir, config.name, key, where) if of_runs else None
        found[key] = before or newest_run(where, key)
    return dc.replace(composed, config=dc.replace(config, **found))


def _on_trained(job: Composed) -> Composed:
    """The job with the model, tokenizer and objective of its checkpoint, for verbs that read a trained model.

    Raises:
        ConfigError: the checkpoint holds no model, or one that contradicts the configuration.
    """
    config = job.config
    if not isinstance(config, OnTrained) or (where := config.checkpoint or config.init_from) is None:
        return job
    if None not in (config.checkpoint, config.init_from):
        what = f"`init_from` must be null with checkpoint={config.checkpoint}, which names the weights"
        raise ConfigError(f"{what}, but is {config.init_from!r} instead.")
    from txtrain.checkpoint.described import describe

    job = dc.replace(job, config=dc.replace(config, checkpoint=where, init_from=None))
    return of_checkpoint(job, describe(where))

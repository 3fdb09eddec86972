"""The jobs of a command line: its overrides, and what comes along with init_from, as typed configurations.

Composing ends here, above checkpoint/ and hf/, because only they can tell what lies in the folder that init_from names.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.override_parser.types import Override

from txtrain.cli.verbs import VERBS, root_of
from txtrain.config import compose as composition
from txtrain.config.composed import Composed
from txtrain.config.init_from import applied
from txtrain.config.loader import Loader, make_loader
from txtrain.config.overrides import expand
from txtrain.config.schema import Export, Generate, Train
from txtrain.errors import ConfigError


def compose(
    overrides: Sequence[str] = (), verb: str = "train", config_dir: str | None = None
) -> Train | Generate | Export:
    """The typed, validated configuration that `txtrain VERB OVERRIDES` would run.

    Raises:
        ConfigError: whatever the command line would refuse, in the same words.
    """
    if verb not in VERBS:
        raise ConfigError(f"`verb` must be one of {', '.join(VERBS)}, but is {verb!r} instead.")
    loader = make_loader(config_dir)
    config: Train | Generate | Export = compose_job(verb, expand(overrides, False, loader)[0], loader)[0].config
    return config


def compose_job(verb: str, overrides: list[Override], loader: Loader) -> tuple[Composed, list[Override]]:
    """One job of `expand`, and its overrides as Hydra got them."""
    job, lines = composition.compose_job(verb, root_of(verb), overrides, loader)
    return with_init_from(job), lines


def with_init_from(job: Composed) -> Composed:
    """The job with the model and the tokenizer that init_from brings. A resumed run has them in its config.yaml.

    Raises:
        ConfigError: there is no model there, or the configuration says something else than it.
    """
    where = getattr(job.config, "init_from", None)
    if where is None or job.config.resume not in ("auto", "never"):
        return job
    from txtrain.checkpoint.load import describe

    found = describe(where, key="init_from")
    return applied(job, found.model, found.tokenizer)

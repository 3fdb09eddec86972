"""Keys whose values are taken as typed (prompts, paths). All others follow Hydra's override grammar."""

from __future__ import annotations

import re

from txtrain.config.schema import Prepare
from txtrain.config.schema_of_trained import Evaluate, Export, Generate, Predict
from txtrain.errors import ConfigError
from txtrain.ground.convert import marked
from txtrain.ground.plain_files import is_whole

LITERALS = frozenset(key for root in (Prepare, Evaluate, Predict, Generate, Export) for key in marked(root, "literal"))

_PATHS = "data.val_path"  # Hydra's grammar, for null and named sets; but commas separate paths, as in data.path
_GRAMMAR = re.compile(r"""["'{[]|\w+\(""")


def escape(value: str) -> str:
    """`value` escaped for OmegaConf's interpolation, which halves the backslashes before `${`, and only those."""
    return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", value)


def quote(value: str) -> str:
    """`value` quoted for Hydra's parser and OmegaConf's interpolation."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(escape(value), Quote.single).with_quotes()


def protect(override: str, sweep: bool) -> str:
    """The override, with the value quoted if the key is literal; in a sweep commas separate values.

    Raises:
        ConfigError: it is not UTF-8, so that no file could hold it.
    """
    key, equals, value = override.partition("=")
    if not is_whole(override):
        raise ConfigError(f"`{key.encode(errors='replace').decode()}` must be text in UTF-8, but is {value!r} instead.")
    name = key.lstrip("+")
    paths = name == _PATHS and not sweep and "," in value and not _GRAMMAR.match(value)
    if not equals or not (name in LITERALS or paths):
        return override
    return f"{key}={','.join(map(quote, value.split(',') if sweep else [value]))}"

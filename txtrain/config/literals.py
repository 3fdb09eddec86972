"""Values that are taken as typed. Everything else on the command line is Hydra's override grammar."""

from __future__ import annotations

import re

from txtrain.config.schema import Export, Generate, Prepare
from txtrain.errors import ConfigError
from txtrain.ground.convert import marked
from txtrain.ground.plain_files import is_whole

LITERALS = frozenset(key for root in (Prepare, Generate, Export) for key in marked(root, "literal"))

_PATHS = "data.val_path"  # in Hydra's grammar, for null and for named sets; but commas separate paths, as in data.path
_GRAMMAR = re.compile(r"""["'{[]|\w+\(""")


def escape(value: str) -> str:
    """What OmegaConf's interpolation turns back into `value`: it halves the backslashes before `${`, and only those."""
    return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", value)


def quote(value: str) -> str:
    """The one spelling that Hydra's parser and then OmegaConf's interpolation turn back into `value`."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(escape(value), Quote.single).with_quotes()


def protect(override: str, sweep: bool) -> str:
    """The override with a literal key's value quoted; in a sweep every comma separates values.

    Raises:
        ConfigError: it is not UTF-8: nothing that is written down could hold it.
    """
    key, equals, value = override.partition("=")
    if not is_whole(override):
        raise ConfigError(f"`{key.encode(errors='replace').decode()}` must be text in UTF-8, but is {value!r} instead.")
    name = key.lstrip("+")
    paths = name == _PATHS and not sweep and "," in value and not _GRAMMAR.match(value)
    if not equals or not (name in LITERALS or paths):
        return override
    return f"{key}={','.join(map(quote, value.split(',') if sweep else [value]))}"

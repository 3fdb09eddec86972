"""Keys whose values are taken as typed (prompts, paths). All others follow Hydra's override grammar."""

from __future__ import annotations

import re

from txtrain.config.schema import Prepare
from txtrain.config.schema_of_trained import Evaluate, Export, Generate, Predict
from txtrain.errors import ConfigError
from txtrain.ground.convert import is_marked
from txtrain.ground.plain_files import is_whole

ROOTS = (Prepare, Evaluate, Predict, Generate, Export)  # have all of them

_PATHS = "data.val_path"  # Hydra's grammar, for null and named sets; but commas separate paths, as in data.path
_GRAMMAR = re.compile(r"""["'{[]|\w+\(""")
# A quoted text, or words in a list or a sweep: outside quotes Hydra's grammar knows no letters but ASCII's.
_WORDS = re.compile(r"""'[^']*'|"[^"]*"|[^\s,\[\]'"]+(?: +[^\s,\[\]'"]+)*""")
_FURTHER = re.compile(r"[(){}\\$]")  # signs of that grammar, with which a value is left as it is


def escape(value: str) -> str:
    """`value` escaped for OmegaConf's interpolation, which halves the backslashes before `${`, and only those."""
    return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", value)


def quote(value: str) -> str:
    """`value` quoted for Hydra's parser and OmegaConf's interpolation."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(escape(value), Quote.single).with_quotes()


def _quoted(word: re.Match[str]) -> str:
    return word[0] if word[0].isascii() or word[0][0] in "'\"" else quote(word[0])


def protect(override: str, sweep: bool) -> str:
    """The override, with the value quoted if the key is literal; in a sweep commas separate values. Of other keys
    words with letters beyond ASCII are quoted: `data.label_column=größe`.

    Raises:
        ConfigError: it is not UTF-8, so that no file could hold it.
    """
    key, equals, value = override.partition("=")
    if not is_whole(override):
        raise ConfigError(f"`{key.encode(errors='replace').decode()}` must be text in UTF-8, but is {value!r} instead.")
    name = key.lstrip("+")
    paths = name == _PATHS and not sweep and "," in value and not _GRAMMAR.match(value)
    if not equals or not (paths or any(is_marked(root, name, "literal") for root in ROOTS)):
        plain = value.isascii() or _FURTHER.search(value)
        return override if plain else f"{key}={_WORDS.sub(_quoted, value)}"
    return f"{key}={','.join(map(quote, value.split(',') if sweep else [value]))}"

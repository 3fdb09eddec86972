"""What a stranger's tokenizer may ask of the library, which believes what it reads and takes memory and time for it."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from txtrain.errors import ConfigError
from txtrain.ground.plain_files import parse_json

MAX_IDS = 10_000_000  # the largest vocabularies have 1 million
_GROWTH = 1_000  # times that rules of replacement may lengthen a text; those of NFKC: 18
_STEPS = 100  # of a sequence of rules; models have up to ten
_LONGEST_WORD = 10_000  # characters of a word, which WordPiece reads in quadratic time; BERT: 100
_TABLE = re.compile(r'charsmap"\s*:\s*"([^"]*)"')
_ESCAPED_LETTER = re.compile(r"\\u00[4-7]")  # no program writes one: it hides a name from the search


def check_tables(text: str, where: str) -> str:
    """A tokenizer.json that the library can read: of a table's size, which stands in it, memory is taken unseen.

    Raises:
        ConfigError: a table is shorter than it says.
    """
    if _ESCAPED_LETTER.search(text):
        text = json.dumps(parse_json(text, where))
    for found in _TABLE.finditer(text):
        try:
            table = base64.b64decode(json.loads(f'"{found[1]}"'))
        except ValueError:
            table = b""
        check_table(table, where)
    return text


def check_table(table: bytes, where: str) -> None:
    """Check a compiled table of normalisations (`precompiled_charsmap`): the size of its trie, the trie, its texts."""
    size = int.from_bytes(table[:4], "little")
    if len(table) < 8 or size % 4 or 4 + size > len(table):
        raise ConfigError(f"{where}: its table of normalisations must have the size that it states, but has not.")


def check_parts(backend: Any, where: str) -> None:
    """Check the parts of a tokenizer that was read.

    Raises:
        ConfigError: names the part and its limit.
    """
    # The library's models of other kinds have no such field.
    dropout, word = (getattr(backend.model, name, None) for name in ("dropout", "max_input_chars_per_word"))
    if dropout:
        why = "a text must become the same tokens each time"
        raise ConfigError(f"{where}: `model.dropout` must be null, but is {dropout:g} instead: {why}.")
    if word is not None and word > _LONGEST_WORD:
        must = f"`model.max_input_chars_per_word` must be at most {_LONGEST_WORD:,}"
        raise ConfigError(f"{where}: {must}, but is {word:,} instead.")
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        part = getattr(backend, name)
        steps = [] if part is None else [*_flat(json.loads(part.__getstate__()))]
        if len(steps) > _STEPS:
            raise ConfigError(f"{where}: `{name}` must have at most {_STEPS} steps, but has {len(steps):,}.")
        if (growth := math.prod(map(_growth, steps))) > _GROWTH:
            must = f"must make a text at most {_GROWTH:,} times as long"
            raise ConfigError(f"{where}: `{name}` {must}, but may make it {growth:.3g} times as long.")
    if (after := backend.post_processor) is not None:
        processed = plain = None
        with contextlib.suppress(Exception):  # a vocabulary without this letter, and without a token for unknown ones
            processed = backend.encode("a", add_special_tokens=False).ids
            backend.post_processor = None
            plain = backend.encode("a", add_special_tokens=False).ids
        backend.post_processor = after
        if processed != plain:
            raise ConfigError(
                f"{where}: `post_processor` must leave the tokens of a text as they are, but changes them."
            )


def _flat(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps of nested sequences."""
    if part.get("type") != "Sequence":
        yield part
        return
    for steps in part.values():
        for step in steps if isinstance(steps, list) else ():
            yield from _flat(step)


def _growth(step: dict[str, Any]) -> float:
    """How many times as long a step may make a text, at most."""
    if step.get("type") == "Prepend":  # once a text
        return max(1.0, len(step["prepend"]) / 10)
    if step.get("type") == "Precompiled":
        table = base64.b64decode(step["precompiled_charsmap"])
        return max(map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")), default=1) or 1
    if step.get("type") != "Replace":
        return 1
    written = len(step["content"])
    given = len(step["pattern"].get("String", ""))  # an expression may match where nothing is
    return max(1.0, written / given) if given else written + 1


def check_frame(ids: list[int], found: set[Any], n_texts: int, vocab_size: int) -> None:
    """Check what a tokenizer put around texts.

    Raises:
        ConfigError: a text is missing, or an id is not in the vocabulary.
    """
    beyond = [i for i in ids if i >= vocab_size]
    if beyond or not found >= {*range(n_texts)}:
        why = f"{beyond[0]} is no token" if beyond else "a text is left out"
        raise ConfigError(
            "`data.tokenizer` must put special tokens around texts (`post_processor` of its tokenizer.json), "
            f"but {why}."
        )

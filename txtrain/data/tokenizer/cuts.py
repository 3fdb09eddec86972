"""Cut a text into pieces that are encoded separately: memory does not depend on its length, and all cores are busy.

Pieces end before the end of a line. GPT-2's pre-tokenizer splits there in any case; a tokenizer that puts a space
before each text (SentencePiece's) adds such a token at each of these cuts. If lines are long or missing, a piece is cut
further at places where its tokenizer provably merges nothing, so that its tokens do not change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

PIECE = 1 << 18  # characters
_SMALL = 1 << 16  # characters of a further cut piece

# (text, index) -> the first cut from index on: the end of the text before it, and the begin of the text after it.
Places = Callable[[str, int], "tuple[int, int] | None"]

# Letters and digits of all Unicode versions, each a grapheme of its own after a space: no marks, no Thai vowels.
_WORD = (
    "0-9A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ff\u0391-\u03a1\u03a3-\u03c9\u0410-\u044f\u05d0-\u05ea"
    "\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
_END_OF_WORD = re.compile(rf"(?<=[{_WORD}])(?=[ ,.;:!?\u3001\u3002\uff0c])")
_BETWEEN_WORDS = re.compile(rf"(?<=[{_WORD}]) (?=[{_WORD}])")
_SPACE = "\u2581"
_OF_SENTENCEPIECE = ("Precompiled", "Strip", "Prepend", "Replace")


def cut(chunks: Iterator[str], places: Places | None) -> Iterator[str]:
    """The pieces of a text that comes in chunks of any length. places: of the tokenizer; None: unknown."""
    pieces, waiting, n = _Pieces(places), [""], 0
    for chunk in chunks:
        waiting.append(chunk)
        n += len(chunk)
        if n >= len(pieces.held):  # or a text that cannot be cut would be copied with every chunk
            yield from pieces.take("".join(waiting))
            waiting, n = [], 0
    yield from pieces.take("".join(waiting))
    yield from _smaller(pieces.held, places)


class _Pieces:
    """held: the text after the last cut. Its piece began `before` characters ahead of it."""

    def __init__(self, places: Places | None) -> None:
        self.held, self.places, self.before, self.searched = "", places, 0, 0

    def take(self, text: str) -> Iterator[str]:
        self.held += text
        while self.before + len(self.held) > PIECE:
            end = self._end_of_line()
            if end < 0:
                break
            yield from _smaller(self.held[:end], self.places)
            self.held, self.before, self.searched = self.held[end:], 0, 0
        if len(self.held) > PIECE and self.places:
            *whole, rest = _smaller(self.held, self.places)
            yield from whole
            self.before += len(self.held) - len(rest)
            self.held, self.searched = rest, len(rest)

    def _end_of_line(self) -> int:
        """The first line end far enough from the last cut with no white space before it; -1: there is none yet."""
        end = self.held.find("\n", max(self.searched, PIECE - (PIECE >> 3) - self.before))
        while end > 0 and self.held[end - 1].isspace():
            end = self.held.find("\n", end + 1)
        self.searched = len(self.held)
        return end


def _smaller(text: str, places: Places | None) -> Iterator[str]:
    at = 0
    while places and len(text) - at > 2 * _SMALL and (place := places(text, at + _SMALL)):
        yield text[at : place[0]]
        at = place[1]
    yield text[at:]


# --------------------------------------------------------------------------------------------------------------- places


def places_of(backend: Any) -> Places | None:
    """Where a text may be cut without changing its tokens; None if that is unknown for the tokenizer."""
    said = json.loads(backend.to_str())
    model, normalizer, splitter = said["model"], said["normalizer"], said["pre_tokenizer"] or {"type": None}
    named = [token for token in said["added_tokens"] if not token["special"]]  # matched in text before anything else
    if model.get("dropout") or any(
        t["lstrip"] or t["rstrip"] or {" ", "\n", _SPACE} & set(t["content"]) for t in named
    ):
        return None
    if splitter["type"] == "ByteLevel" and splitter.get("use_regex", True):
        return None if splitter["add_prefix_space"] or normalizer or named else byte_level_places
    if splitter["type"] == "BertPreTokenizer":
        return _between_words if normalizer is None or normalizer["type"] == "BertNormalizer" else None
    return _between_words if splitter["type"] is None and _is_sentencepiece(model, normalizer or {}) else None


def byte_level_places(text: str, start: int) -> tuple[int, int] | None:
    """For GPT-2's pre-tokenizer: after a word, which ends there whatever follows."""
    found = _END_OF_WORD.search(text, start)
    return found and (found.start(), found.end())


def _between_words(text: str, start: int) -> tuple[int, int] | None:
    """The space is dropped: BERT has no token for it, and SentencePiece puts one before each text."""
    found = _BETWEEN_WORDS.search(text, start)
    return found and (found.start(), found.end())


def _is_sentencepiece(model: dict[str, Any], normalizer: dict[str, Any]) -> bool:
    """Whether a space is put before each text, and tokens have spaces at their begin only."""
    steps = normalizer.get("normalizers", [normalizer])
    replaced = [step["pattern"] for step in steps if step.get("type") == "Replace"]
    if (
        any(step.get("type") not in _OF_SENTENCEPIECE for step in steps)
        or not any(step.get("prepend") == _SPACE for step in steps)
        or {"String": " "} not in replaced
        or any(pattern not in ({"String": " "}, {"Regex": " {2,}"}) for pattern in replaced)
        or model["type"] not in ("BPE", "Unigram")
        or model.get("ignore_merges")
    ):
        return False
    vocabulary = model["vocab"] if model["type"] == "BPE" else [piece for piece, _ in model["vocab"]]
    return _SPACE in vocabulary and all(_SPACE not in token.lstrip(_SPACE) for token in vocabulary)

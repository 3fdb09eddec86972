"""Rows of preferences: a prompt, the answer that is preferred, and another one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from txtrain.data.chat.formats import checked, role_of
from txtrain.data.chat.turns import Conversation, shared
from txtrain.errors import ConfigError, hint, shorten

Row = Mapping[str, Any]
Turns = list[dict[str, Any]]


class Columns(NamedTuple):
    """The config's names of the columns. prompt: None: what both answers begin with."""

    prompt: str | None
    chosen: str
    rejected: str


class Texts(NamedTuple):
    """An answer as written: a prompt, and what follows it."""

    prompt: str
    answer: str


class Preference(NamedTuple):
    """Both answers to one prompt. number: of its row in the source. where: its name in errors."""

    chosen: Conversation | Texts
    rejected: Conversation | Texts
    number: int
    where: str

    @property
    def text(self) -> str:
        """Prompt and answers, to train a tokenizer on."""
        return "\n".join(_text(side) for side in (self.chosen, self.rejected))


def preferences(row: Row, columns: Columns, form: str, number: int, where: str, turns: bool) -> Iterator[Preference]:
    """The pairs of a row; of a tree, any two answers to one prompt that have different ranks.

    Args:
        form: auto, text or oasst.
        turns: texts with a prompt are turns of a conversation; else they are as written.

    Raises:
        ConfigError: the row has no such columns, or they hold neither texts nor messages.
    """
    tree = row.get("prompt", row)
    if form == "oasst" or (form == "auto" and isinstance(tree, dict) and "replies" in tree):
        yield from _of_tree(row, number, where)
        return
    _check_columns(row, columns, where)
    prompt = None if columns.prompt is None else row.get(columns.prompt)
    chosen, rejected = row[columns.chosen], row[columns.rejected]
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        if prompt is None:
            cut = _of_both(chosen, rejected)
            yield Preference(
                Texts(chosen[:cut], chosen[cut:]), Texts(rejected[:cut], rejected[cut:]), number, where
            )
            return
        if form == "text" or not turns:
            yield Preference(Texts(prompt, chosen), Texts(prompt, rejected), number, where)
            return
    if form == "text":
        raise ConfigError(f"`data.format` must be auto for messages, but is text instead, and {where} has them.")
    before = _turns(prompt, "user", where)
    yield _told(before, _turns(chosen, "assistant", where), _turns(rejected, "assistant", where), number, where)


def _check_columns(row: Row, columns: Columns, where: str) -> None:
    for key, name in (("chosen_column", columns.chosen), ("rejected_column", columns.rejected)):
        if name not in row:
            there = shorten(", ".join(row)) or "(there is none)"
            raise ConfigError(
                f"`data.{key}` must be one of {there} for {where}, but is {name} instead.{hint(name, list(row))}"
            )
    if columns.prompt not in (None, "prompt") and columns.prompt not in row:
        raise ConfigError(f"`data.prompt_column` must be one of {', '.join(row)} for {where}, but is {columns.prompt}.")
    for column in columns:
        if not isinstance(row.get(column or "", ""), (str, list)):
            said = shorten(repr(row[column or ""]))
            raise ConfigError(f"`data.path`: {column} must be a text or a list of messages, but is {said} in {where}.")


def _turns(found: Any, role: str, where: str) -> Turns:
    if found is None:
        return []
    return checked([{"role": role, "content": found}] if isinstance(found, str) else found, where)


def _told(before: Turns, chosen: Turns, rejected: Turns, number: int, where: str) -> Preference:
    """Conversations of which what follows the prompt is trained. Both answers may repeat the prompt."""
    sides = [turns if turns[: len(before)] == before else [*before, *turns] for turns in (chosen, rejected)]
    n = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(*sides, strict=False)))
    n -= sides[0] == sides[1]  # equal answers, which the source leaves out
    for turns in sides:
        if not any(turn["role"] == "assistant" for turn in turns[n:]):
            raise ConfigError(f"`data.path`: an answer must have an assistant's turn, but one of {where} has none.")
    context = frozenset(range(n))
    made = [Conversation(turns, number, where, context=context) for turns in sides]
    return Preference(made[0], made[1], number, where)


def _of_tree(row: Row, number: int, where: str) -> Iterator[Preference]:
    """Rank 0 is the best (2304.07327)."""
    waiting: list[tuple[Turns, Row]] = [([], row.get("prompt", row))]
    try:
        while waiting:
            before, node = waiting.pop()
            path = [*before, {"role": role_of(node["role"], where), "content": node["text"]}]
            replies = [reply for reply in node.get("replies") or () if not reply.get("deleted")]
            ranked = [one for one in replies if role_of(one["role"], where) == "assistant"]
            ranked = sorted((one for one in ranked if one.get("rank") is not None), key=lambda one: int(one["rank"]))
            for better, worse in itertools.combinations(ranked, 2):
                if better["rank"] != worse["rank"] and better["text"] != worse["text"]:
                    chosen, rejected = (_turns(one["text"], "assistant", where) for one in (better, worse))
                    yield _told(checked(path, where), chosen, rejected, number, where)
            waiting += [(path, reply) for reply in reversed(replies)]
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as e:  # the last: a rank of 1e999
        said = f"no {e}" if isinstance(e, KeyError) else shorten(str(e))
        raise ConfigError(f"`data.format`: {where} must be a tree of OASST, but is not: {said}.") from e


def _of_both(a: str, b: str) -> int:
    """Length of the common beginning, without the space or the letters of a word that only one goes on with."""
    n = shared(a, b)
    while n > 0 and n < max(len(a), len(b)) and not a[n - 1].isspace() and a[n - 1].isalnum():
        n -= 1
    return n - 1 if n and a[n - 1] == " " else n


def _text(side: Conversation | Texts) -> str:
    if isinstance(side, Texts):
        return side.prompt + side.answer
    return "\n".join(turn["content"] for turn in side.messages if isinstance(turn.get("content"), str))

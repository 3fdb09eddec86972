"""Rows of the usual chat formats, as conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from txtrain.data.chat.turns import Conversation
from txtrain.errors import ConfigError, hint, shorten
from txtrain.ground.plain_files import parse_json

Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "oasst", "self_instruct"]
Row = Mapping[str, Any]

_LISTS = ("messages", "conversations", "conversation")
_SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
    "system": "system",
}


def conversations(row: Row, form: Format, number: int, where: str) -> Iterator[Conversation]:
    """The conversation of a row; of self-instruct one per instance, of a tree one per leaf.

    Args:
        form: auto: recognised by the row's keys.
        number: of the row in the source.
        where: name of the row in errors.

    Raises:
        ConfigError: the row is not of this format, or of none.
    """
    name = _format_of(row, where) if form == "auto" else form
    try:
        yield from _READ[name](row, number, where)
    except (KeyError, TypeError, AttributeError) as e:
        said = f"no {e}" if isinstance(e, KeyError) else str(e)
        raise ConfigError(
            f"`data.format`: {where} must be of the format {name}, but is not: {shorten(said)} in {_shown(row)}."
        ) from e


def _format_of(row: Row, where: str) -> str:
    for key in _LISTS:
        turns = row.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            return "sharegpt" if "from" in turns[0] else "messages"
        if turns == []:
            return "messages"
    if "replies" in row or (isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]):
        return "oasst"
    for name, keys in (
        ("self_instruct", ("instruction", "instances")),
        ("alpaca", ("instruction", "output")),
        ("prompt_completion", ("prompt", "completion")),
    ):
        if all(key in row for key in keys):
            return name
    raise ConfigError(
        f"`data.format` must be one of {', '.join(_READ)}, "
        f"but {where} is of none: it has the keys {shorten(', '.join(row))}."
    )


def _messages(row: Row, number: int, where: str) -> Iterator[Conversation]:
    yield Conversation(checked(row[_list_of(row)], where), number, where, _tools(row, where))


def _sharegpt(row: Row, number: int, where: str) -> Iterator[Conversation]:
    begin = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    turns = [{"role": role_of(turn["from"], where), "content": turn["value"]} for turn in row[_list_of(row)]]
    yield Conversation(checked([*begin, *turns], where), number, where, _tools(row, where))


def _alpaca(row: Row, number: int, where: str) -> Iterator[Conversation]:
    begin = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    history = row.get("history") or ()
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise TypeError(f"{shorten(repr(pair))} instead of a question and its answer in `history`")
    before = [turn for asked, said in history for turn in _pair(asked, said)]
    yield Conversation(checked([*begin, *before, *_pair(_asked(row, row), row["output"])], where), number, where)


def _prompt_completion(row: Row, number: int, where: str) -> Iterator[Conversation]:
    asked, said = row["prompt"], row["completion"]
    before = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    after = said if isinstance(said, list) else [{"role": "assistant", "content": said}]
    context = frozenset(k for k, turn in enumerate(before) if turn.get("role") == "assistant")
    yield Conversation(checked([*before, *after], where), number, where, _tools(row, where), context)


def _self_instruct(row: Row, number: int, where: str) -> Iterator[Conversation]:
    for instance in row["instances"]:
        yield Conversation(checked(_pair(_asked(row, instance), instance["output"]), where), number, where)


def _oasst(row: Row, number: int, where: str) -> Iterator[Conversation]:
    """Each assistant turn is trained once: in the first path from the root to a leaf that holds it."""
    waiting: list[tuple[list[dict[str, Any]], frozenset[int], Row]] = [([], frozenset(), row.get("prompt", row))]
    while waiting:
        before, context, node = waiting.pop()
        path = [*before, {"role": role_of(node["role"], where), "content": node["text"]}]
        replies = [reply for reply in node.get("replies") or () if not reply.get("deleted")]
        if not replies:
            yield Conversation(checked(path, where), number, where, context=context)
        seen = frozenset(k for k, turn in enumerate(path) if turn["role"] == "assistant")
        waiting += [(path, seen if i else context, reply) for i, reply in reversed(list(enumerate(replies)))]


_READ: dict[str, Callable[[Row, int, str], Iterator[Conversation]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "oasst": _oasst,
    "self_instruct": _self_instruct,
}


# --------------------------------------------------------------------------------------------------------------- pieces


def _list_of(row: Row) -> str:
    return next((key for key in _LISTS if key in row), _LISTS[0])


def _pair(asked: Any, said: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def _asked(row: Row, instance: Row) -> str:
    """Alpaca's instruction and input."""
    beside = instance.get("input")
    return f"{row['instruction']}\n\n{beside}" if beside else row["instruction"]


def role_of(speaker: Any, where: str) -> str:
    role = _SPEAKERS.get(speaker.lower() if isinstance(speaker, str) else "")
    if role is None:
        near = hint(str(speaker), list(_SPEAKERS))
        raise ConfigError(
            f"`data.path`: the speaker must be one of {', '.join(_SPEAKERS)}, "
            f"but is {shorten(repr(speaker))} in {where}.{near}"
        )
    return role


def _tools(row: Row, where: str) -> Any:
    """A list of tools, or None; some files have them as a JSON string."""
    found = row.get("tools")
    if isinstance(found, str) and found.strip():
        found = parse_json(f'{{"tools": {found}}}', f"`tools` of {where}")["tools"]
    if found and not (isinstance(found, list) and all(isinstance(tool, dict) for tool in found)):
        raise ConfigError(f"`data.path`: `tools` must be a list of mappings, but is {shorten(repr(found))} in {where}.")
    return found or None


def checked(turns: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list):
        raise TypeError(f"{type(turns).__name__} instead of a list of messages")
    for turn in turns:
        content = turn.get("content") if isinstance(turn, dict) else None
        text = isinstance(content, (str, list)) or (
            content is None and isinstance(turn, dict) and turn.keys() - {"role", "content"}
        )
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not text:
            raise ConfigError(
                f"`data.path`: a message must have a role and a content of text, but is {_shown(turn)} in {where}."
            )
    return turns


def _shown(what: Any) -> str:
    return shorten(json.dumps(what, ensure_ascii=False, default=str))

"""`txtrain generate chat=true` talks in the terminal; `messages=FILE.jsonl` answers conversations."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from txtrain.cli.writer import Writer, show
from txtrain.data.chat.formats import conversations
from txtrain.data.chat.template import Message, Template
from txtrain.data.sources.files import missing
from txtrain.errors import ConfigError, shorten
from txtrain.ground import files
from txtrain.ground.plain_files import parse_json, split_lines

HELP = "Enter sends, Ctrl-C stops an answer, /reset begins anew, Ctrl-D ends."
RESET = "/reset"


class Chat:
    """A writer that answers conversations by its tokenizer's template, as training renders them."""

    def __init__(self, writer: Writer, template: Template) -> None:
        self.writer, self.template = writer, template
        writer.ends = (*writer.ends, *self._ends_of_turn())

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """Token ids of the prompt for the next assistant turn."""
        text = self.template.prompt(self.with_system(messages), tools)
        ids: list[int] = self.writer.tokenizer.as_written(text).ids
        return ids

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        system = self.writer.config.system
        if system is None or any(message["role"] == "system" for message in messages):
            return [*messages]
        return [{"role": "system", "content": system}, *messages]

    def _ends_of_turn(self) -> tuple[int, ...]:
        """The token with which the template ends an assistant's turn, where it writes one."""
        tokenizer = self.writer.tokenizer
        turns = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "1"}]
        prompt, whole = self.template.render(turns, None, [(1, True), (2, False)])
        if prompt.error is not None or whole.error is not None:
            return ()
        begin, ids = len(tokenizer.as_written(prompt.text).ids), list(tokenizer.as_written(whole.text).ids)
        last = next((i for i in range(len(ids) - 1, begin, -1) if ids[i] in tokenizer.added_ids), None)
        return () if last is None or tokenizer.decode(ids[last + 1 :]).strip() else (ids[last],)


def talk(writer: Writer) -> None:
    """A conversation with standard input, until it ends."""
    with _template(writer, "chat") as template:
        chat, is_terminal = Chat(writer, template), sys.stdin.isatty()
        if is_terminal:
            import readline  # noqa: F401  (lines can be edited)

            print(HELP, file=sys.stderr)
        messages: list[Message] = []
        for line in _lines(is_terminal):
            if line.strip() == RESET:
                messages = []
            elif line.strip():
                messages = _answered(chat, [*messages, {"role": "user", "content": line}])


def _lines(is_terminal: bool) -> Iterator[str]:
    while True:
        try:
            yield input("> " if is_terminal else "")
        except EOFError:
            if is_terminal:
                print()
            return
        except KeyboardInterrupt:  # of a line that is being typed
            print("\n(Ctrl-D ends)", file=sys.stderr)
        except UnicodeError as e:
            raise ConfigError(f"`chat`: standard input must be text in UTF-8, but is not: {e}.") from e


def _answered(chat: Chat, messages: list[Message]) -> list[Message]:
    """The conversation with an answer, which is printed; without its last turn where there is no room for one."""
    writer = chat.writer
    try:
        ids = chat.prompt(messages)
        writer.check_length([ids], "chat")
    except ConfigError as e:  # a template may refuse a turn; the conversation may be too long
        print(f"txtrain: {e.problems[0] if e.problems else e} {RESET} begins anew.", file=sys.stderr)
        return messages[:-1]
    said = writer.stream(ids, partial(show, end=""), len(messages), interruptible=True)
    print(flush=True)
    return [*messages, {"role": "assistant", "content": said}]


def answer_file(writer: Writer) -> None:
    """Answer each conversation of `messages`, on all ranks; write a line for each answer, in the order of the file.

    A conversation that ends with an assistant's turn is answered anew: that turn is not read.
    """
    config = writer.config
    assert config.messages is not None
    if config.out is not None:
        path = files.path_of(config.out, "out")
        files.check_writable(path.parent, "out")
        if path.is_dir():
            raise ConfigError(f"`out` must be a file, but {config.out!r} is a folder.")
    with writer.together(lambda: _template(writer, "messages")) as template:
        chat = Chat(writer, template)
        asked, rows = writer.together(lambda: _asked(chat, config.messages or ""))
        lines = []
        for index, (turns, texts) in enumerate(zip(asked, writer.texts(rows, "messages"), strict=True)):
            for text in texts:
                whole = [*chat.with_system(turns), {"role": "assistant", "content": text}]
                lines.append(json.dumps({"index": index, "text": text, "messages": whole}, ensure_ascii=False))
                if config.out is None and writer.is_first:
                    print(lines[-1], flush=True)
    if config.out is not None and writer.is_first:
        path = files.path_of(config.out, "out")
        with files.writing(path.parent, "out"):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, "".join(line + "\n" for line in lines))
        print(f"{config.messages} -> {config.out}: {len(lines):,} answers")


def _asked(chat: Chat, name: str) -> tuple[list[list[Message]], list[list[int]]]:
    """The turns to answer of each conversation of a file, and their prompts."""
    talks = list(_talks(name))
    asked = [_before_answer(talk.messages) for talk in talks]
    return asked, [chat.prompt(turns, talk.tools) for turns, talk in zip(asked, talks, strict=True)]


def _template(writer: Writer, key: str) -> Template:
    if writer.tokenizer.chat_template is None:
        raise ConfigError(
            f"`{key}` must not be given for {writer.config.checkpoint!r}: its tokenizer has no chat template. "
            "A run on data=chat keeps its template; else put chat_template.jinja beside the tokenizer."
        )
    if writer.answers:
        raise ConfigError(f"`{key}` must not be given for a model with an encoder, which reads no chat template.")
    return Template(writer.tokenizer)


def _talks(name: str) -> Iterator[Any]:
    path = files.path_of(name, "messages")
    if not path.is_file():
        raise ConfigError(missing(name, "messages", "a .jsonl file with a conversation a line"))
    try:
        lines = split_lines(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        what = "a .jsonl file in UTF-8"
        raise ConfigError(f"`messages` must be {what}, but {name!r} cannot be read: {shorten(e)}.") from e
    found = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"line {number} of {name}"
            yield from conversations(parse_json(line, where), "auto", number - 1, where)
            found += 1
    if not found:
        raise ConfigError(f"`messages` must hold at least one conversation, but {name!r} holds none.")


def _before_answer(messages: Sequence[Message]) -> list[Message]:
    turns = [*messages]
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    return turns

"""Chat templates: messages to text, rendered in a separate process, since templates are untrusted (`renderer.py`)."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from txtrain.data.chat import renderer
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.errors import ConfigError, shorten

Message = Mapping[str, Any]
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
_AT_ONCE = 32 << 20  # characters of all that one request renders: of a long conversation's many prefixes
_REASONING = ("reasoning_content", "thinking", "reasoning")  # synonyms


class Rendered(NamedTuple):
    """spans: [begin, end) of the characters within `{% generation %}`. error: why there is no text."""

    text: str
    spans: Sequence[tuple[int, int]] = ()
    error: str | None = None


class Template:
    """The chat template of a tokenizer, for use in a `with` statement.

    Raises:
        ConfigError: there is none, it is no Jinja template, or (inside the `with`) it takes too much memory or time.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.chat_template is None:
            raise ConfigError(
                "`data.chat_template` must be a file, since data.tokenizer brings no chat template, "
                "but is null instead."
            )
        self.templates, self.where = tokenizer.chat_template
        self.tokens = tokenizer.names
        self.marks_generation = any(_GENERATION.search(text) for text in self.templates.values())

    def __enter__(self) -> Template:
        # In its own session: signals to the process group of the run must not reach it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(renderer.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self._ask({"templates": self.templates, "tokens": self.tokens})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def render(self, messages: Sequence[Message], tools: Any, wanted: Sequence[tuple[int, bool]]) -> list[Rendered]:
        """For each (n, prompt) of `wanted` the first n messages, with the header of an assistant turn if prompt."""
        name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        plain = [_without_nulls(message) for message in messages]
        several = max(1, _AT_ONCE // (len(json.dumps(plain)) + 1))
        return [
            Rendered(one.get("text", ""), [(b, e) for b, e in one.get("spans", ())], one.get("error"))
            for i in range(0, len(wanted), several)
            for one in self._ask(
                {"name": name, "messages": plain, "tools": tools, "wanted": wanted[i : i + several]}
            )["rendered"]
        ]

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> str:
        """The prompt for a model's answer.

        Raises:
            ConfigError: the template cannot render these messages.
        """
        (found,) = self.render(messages, tools, [(len(messages), True)])
        if found.error is not None:
            shown = shorten(json.dumps([*messages], ensure_ascii=False))
            raise ConfigError(f"`data.chat_template`: {self.where} cannot render {shown}: {shorten(found.error)}")
        return found.text

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            slow = f"it takes more than {renderer.SECONDS} s for a conversation"
            line = json.dumps({"fatal": slow if code == -signal.SIGPROF else f"its process ended with {code}"})
        answer: dict[str, Any] = json.loads(line)
        if "fatal" in answer:
            why = shorten(answer["fatal"])
            wanted = "a template that can be rendered"
            raise ConfigError(f"`data.chat_template` must be {wanted}, but {self.where} is not: {why}.")
        return answer


def _without_nulls(message: Message) -> dict[str, Any]:
    """A message as `transformers` gives it to a template: without null values, its reasoning under all names."""
    made = {key: value for key, value in message.items() if value is not None}
    reasoning = next((made[key] for key in _REASONING if key in made), None)
    return made if reasoning is None else {"thinking": reasoning, **made, "reasoning_content": reasoning}

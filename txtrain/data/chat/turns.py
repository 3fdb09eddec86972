"""Which tokens of a conversation are trained: the assistant's, and the token that ends its turn.

    <|user|> Hi <|end|> <|assistant|> Hello <|end|> <|user|> ...        rendered as a whole
    ------- prompt_k -------------->                                     the prompt of `generate` before turn k
    ------- whole_k ------------------------------->                     up to turn k
                                      ~~~~~ ~~~~~~~                      trained

If all prompts and turns of a conversation are prefixes of its tokens, it is one sample. If the template renders a turn
differently once another follows (drops its reasoning, ends only the last turn), there is a sample per assistant turn,
rendered as at inference. So the tokens before a turn are always those of
`apply_chat_template(add_generation_prompt=True)`. All of this is compared on token ids.
"""

from __future__ import annotations

import dataclasses as dc
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from txtrain.data.chat.template import Message, Rendered, Template
from txtrain.data.sources.source import Marked
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.errors import ConfigError, shorten

TrainOn = Literal["assistant", "last_assistant", "all"]


@dc.dataclass(frozen=True)
class Conversation:
    """Messages as in `transformers`: `role`, `content`, and what else a template reads.

    Attributes:
        number: of its row in the source.
        where: its name in errors.
        context: indices of assistant turns that are not trained.
    """

    messages: Sequence[Message]
    number: int
    where: str
    tools: Any = None
    context: frozenset[int] = frozenset()

    def assistant(self) -> list[int]:
        """Indices of the turns to be trained."""
        return [
            k for k, message in enumerate(self.messages) if message["role"] == "assistant" and k not in self.context
        ]


class Turn(NamedTuple):
    """A sample that ends with an assistant turn. exact: it is `whole_k`; else the turn was appended to its prompt."""

    ids: list[int]
    trained: list[bool]
    begin: int  # of the turn
    end: int  # after its last trained token
    exact: bool


class Speaker:
    """Conversations to samples, by a tokenizer and its template. left_out: the number of turns beyond seq_len."""

    def __init__(self, tokenizer: Tokenizer, template: Template, train_on: TrainOn, seq_len: int) -> None:
        self.tokenizer, self.template, self.train_on, self.seq_len = tokenizer, template, train_on, seq_len
        self.left_out = 0

    def samples(self, talk: Conversation) -> list[Marked]:
        """At most seq_len tokens each, whole turns; none without a trained token.

        Raises:
            ConfigError: the template cannot render the conversation, which is shown.
        """
        made = self._all(talk) if self.train_on == "all" else self._assistant(talk)
        return [Marked(ids, trained, talk.number) for ids, trained in made if any(trained[1:])]

    def _all(self, talk: Conversation) -> list[tuple[list[int], list[bool]]]:
        """Every token, of as many messages as fit."""
        n = len(talk.messages)
        ids = self._encoded(self._rendered(talk, n).text) if n else []
        if len(ids) > self.seq_len:
            shorter = [
                one
                for one in self.template.render(talk.messages, talk.tools, [(k, False) for k in range(n - 1, 0, -1)])
                if one.error is None
            ]
            fitting = (found for one in shorter if len(found := self._encoded(one.text)) <= self.seq_len)
            ids = next(fitting, [])
            self.left_out += 1
        return [(ids, [True] * len(ids))]

    def _assistant(self, talk: Conversation) -> list[tuple[list[int], list[bool]]]:
        places = talk.assistant()[-1:] if self.train_on == "last_assistant" else talk.assistant()
        if not places:
            return []
        whole = self._rendered(talk, places[-1] + 1)
        wanted = [pair for k in places for pair in ((k, True), (k + 1, False))]
        found = self.template.render(talk.messages, talk.tools, wanted)
        # A turn whose prompt cannot be rendered (nothing precedes it) is never generated: it is not trained.
        asked = [
            (k, prompt, turn)
            for k, prompt, turn in zip(places, found[::2], found[1::2], strict=True)
            if prompt.error is None and turn.error is None
        ]
        if not asked:
            raise self._refused(talk, next(one.error for one in found if one.error is not None))
        turns = [self._turn(talk, *one) for one in asked]
        ids = self._encoded(whole.text)
        stable = all(turn.exact and ids[: turn.end] == turn.ids[: turn.end] for turn in turns)
        fitting = [turn for turn in turns if (turn.end if stable else len(turn.ids)) <= self.seq_len]
        self.left_out += len(turns) - len(fitting)
        if not stable:
            return [(turn.ids, turn.trained) for turn in fitting]
        if not fitting:
            return []
        trained = [False] * len(ids)
        for turn in fitting:
            trained[turn.begin : turn.end] = turn.trained[turn.begin : turn.end]
        n = len(ids) if len(ids) <= self.seq_len else fitting[-1].end
        return [(ids[:n], trained[:n])]

    # ----------------------------------------------------------------------------------------------------------- a turn

    def _turn(self, talk: Conversation, k: int, prompt: Rendered, whole: Rendered) -> Turn:
        before, encoding = self._encoded(prompt.text), self.tokenizer.as_written(whole.text)
        first: int | None = 0  # index in `whole` of the first character of the encoded text
        ids, offsets = list(encoding.ids), list(encoding.offsets)
        exact = ids[: len(before)] == before
        if not exact:
            text, first = self._rest(talk, k, prompt.text, whole.text)
            rest = self.tokenizer.as_written(text)
            ids, offsets = [*before, *rest.ids], [(0, 0)] * len(before) + list(rest.offsets)
        begin, end = len(before), self._end(ids, len(before))
        trained = [begin <= i < end for i in range(len(ids))]
        if self.template.marks_generation and first is not None:
            marked = [any(b < stop + first and start + first < e for b, e in whole.spans) for start, stop in offsets]
            closing = end - 1 if end and ids[end - 1] in self.tokenizer.added_ids else -1
            some = any(marked[begin:end])
            trained = [
                known and some and (mark or i == closing)
                for i, (known, mark) in enumerate(zip(trained, marked, strict=True))
            ]
        return Turn(ids, trained, begin, end, exact)

    def _end(self, ids: list[int], begin: int) -> int:
        """The index after the token that ends the turn: the last added one if only white space follows; or the end."""
        last = next((i for i in range(len(ids) - 1, begin - 1, -1) if ids[i] in self.tokenizer.added_ids), None)
        return len(ids) if last is None or self.tokenizer.decode(ids[last + 1 :]).strip() else last + 1

    def _rest(self, talk: Conversation, k: int, prompt: str, whole: str) -> tuple[str, int | None]:
        """The text of turn k after a prompt that `whole` renders differently, and its index in `whole`.

        Rendering turns with other contents shows where the turn's own text begins and ends. If the prompt opens what
        the turn itself begins with (DeepSeek-R1's <think>, which `whole` drops), the turn continues from there, with
        its own content (index None).
        """
        if whole.startswith(prompt):
            return whole[len(prompt) :], len(prompt)
        others = []
        for text in ("0", "1"):
            messages = [*talk.messages[:k], {**talk.messages[k], "content": text}]
            others.append(self.template.render(messages, talk.tools, [(k + 1, False)])[0])
        a, b = (one.text for one in others)
        header = shared(a, b)
        if any(one.error is not None for one in others) or shared(whole, a) < header:
            header = shared(prompt, whole)
        opened, said = prompt[header:].strip(), talk.messages[k].get("content")
        if opened and shared(prompt, whole) >= header and isinstance(said, str) and said.lstrip().startswith(opened):
            own = said.lstrip()[len(opened) :]
            return (own.lstrip("\n") if prompt.endswith("\n") else own) + a[len(a) - shared(a[::-1], b[::-1]) :], None
        return whole[header:], header

    # ----------------------------------------------------------------------------------------------------------- pieces

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.as_written(text).ids
        return ids

    def _rendered(self, talk: Conversation, n: int) -> Rendered:
        (found,) = self.template.render(talk.messages, talk.tools, [(n, False)])
        if found.error is not None:
            raise self._refused(talk, found.error)
        return found

    def _refused(self, talk: Conversation, why: str | None) -> ConfigError:
        shown = shorten(json.dumps([*talk.messages], ensure_ascii=False))
        problem = f"{self.template.where} cannot render {talk.where}: {shorten(why)} The conversation: {shown}"
        return ConfigError(f"`data.chat_template`: {problem}")


def shared(a: str, b: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

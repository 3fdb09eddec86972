"""data=preferences: prompts with a preferred answer and another one, in files or in a set for load_dataset."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from txtrain.data.chat.preferences import Columns, Preference, Texts, preferences
from txtrain.data.chat.template import Template
from txtrain.data.chat.turns import Conversation, Speaker
from txtrain.data.sources.chat import ConversationRows, Paths
from txtrain.data.sources.files import Limits
from txtrain.data.sources.source import Marked, Split
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.errors import ConfigError

log = logging.getLogger(__name__)

FORMAT = "preferences 1"  # part of fingerprints: raise it when the tokens or masks of pairs change


class Preferences(ConversationRows):
    """Pairs of answers, each as prompt and answer, of which the answer is trained.

    Args:
        path and so on: as ConversationRows.
        format, prompt_column, chosen_column, rejected_column: as `txtrain.data.chat.preferences` reads them.
        seq_len: tokens of a pair, at most; longer ones are left out.
    """

    in_pairs = True

    def __init__(
        self, path: Paths | None, val_path: Paths | None, name: str | None, split: str, val_split: str | None,
        format: str, chat_template: str | None, prompt_column: str | None, chosen_column: str, rejected_column: str,
        seq_len: int, max_expansion: float, max_text_bytes: int, encoding_errors: str, bad_rows: str,
    ) -> None:
        limits = Limits(max_expansion, max_text_bytes, encoding_errors, {} if bad_rows == "skip" else None)
        super().__init__(path, val_path, name, split, val_split, chat_template, limits, "preferences")
        self.format, self.seq_len = format, seq_len
        self.columns = Columns(prompt_column, chosen_column, rejected_column)

    def preferences(self, split: Split, turns: bool) -> Iterator[Preference]:
        return self.parsed(
            split, lambda row, number, where: preferences(row, self.columns, self.format, number, where, turns)
        )

    def documents(self, split: Split) -> Iterator[str]:
        """Prompts and answers, to train a tokenizer on."""
        return (pair.text for pair in self.preferences(split, False))

    def marked(self, split: Split, tokenizer: Tokenizer) -> Iterator[Marked]:
        """Of each pair the preferred answer, then the other one."""
        n_all = n_longer = n_equal = 0
        with contextlib.ExitStack() as stack:
            speaker: Speaker | None = None
            for pair in self.preferences(split, turns=tokenizer.chat_template is not None):
                if speaker is None and isinstance(pair.chosen, Conversation):
                    template = stack.enter_context(Template(tokenizer))
                    speaker = Speaker(tokenizer, template, "assistant", self.seq_len)
                sides = [self._side(side, speaker, tokenizer, pair) for side in (pair.chosen, pair.rejected)]
                found = [side for side in sides if side is not None]
                n_all += 1
                if len(found) < 2 or sum(len(side.ids) for side in found) > self.seq_len:
                    n_longer += 1
                elif found[0] == found[1]:
                    n_equal += 1
                else:
                    yield from found
        for n, why in ((n_longer, f"longer than data.seq_len={self.seq_len} tokens"), (n_equal, "of equal answers")):
            if n:
                log.warning("%s: %d of %d pairs are %s and left out", split, n, n_all, why)

    def identity(self) -> str:
        return f"{FORMAT} {self.format} {list(self.columns)} {self.seq_len} {super().identity()}"

    def _side(
        self, side: Conversation | Texts, speaker: Speaker | None, tokenizer: Tokenizer, pair: Preference
    ) -> Marked | None:
        """One answer behind its prompt; None if it is too long or has no token to be trained."""
        if isinstance(side, Texts):
            return _as_written(side, tokenizer, pair.number)
        assert speaker is not None
        made = speaker.samples(side)
        if len(made) > 1:
            raise ConfigError(
                f"`data.path`: an answer must be one turn of the assistant with this chat template, which renders a "
                f"turn in another way once another follows, but an answer of {pair.where} has {len(made)}."
            )
        return made[0] if made else None


def _as_written(side: Texts, tokenizer: Tokenizer, number: int) -> Marked | None:
    """BOS, the prompt's tokens as `generate` reads them, the answer's, EOS; the last two are trained."""
    before = [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(side.prompt)]
    whole = tokenizer.encode(side.prompt + side.answer)
    n = len(before) - (tokenizer.bos_id is not None)
    answer = whole[n:] if whole[:n] == before[-n or len(before) :] else tokenizer.encode(side.answer)
    ids = [*before, *answer, tokenizer.eos_id]
    trained = [i >= max(1, len(before)) for i in range(len(ids))]
    return Marked(ids, trained, number) if any(trained) else None

"""data=chat: conversations in files or in a set for load_dataset, of which the assistant's tokens are trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from txtrain.data.chat.formats import Format, conversations
from txtrain.data.chat.template import Template
from txtrain.data.chat.turns import Conversation, Speaker, TrainOn
from txtrain.data.sources.documents import objects_of, rows_of_set
from txtrain.data.sources.files import Limits, find_files, listed
from txtrain.data.sources.hub import load_dataset, set_errors
from txtrain.data.sources.origins import Origins
from txtrain.data.sources.source import Marked, Split
from txtrain.data.tokenizer.tokenizer import ChatTemplate, Tokenizer
from txtrain.errors import ConfigError
from txtrain.ground.files import path_of
from txtrain.ground.plain_files import read_text

log = logging.getLogger(__name__)

FORMAT = "chat 1"  # part of fingerprints: raise it when the tokens or masks of conversations change
KINDS = (".json", ".jsonl", ".parquet")
_TEMPLATE_LIMIT = 1_000_000  # bytes
Paths = str | tuple[str, ...]
T = TypeVar("T")
Rows = Callable[[], Iterable[tuple[str, Mapping[str, Any]]]]  # (place, row), a new iterable at each call


class ConversationRows:
    """Rows of files, or of a set for load_dataset, for sources of conversations.

    Args:
        path, val_path: files, globs, folders, or a list of them; or a name for load_dataset.
        chat_template: a file; None: the tokenizer's.
        what: the contents of the rows, for errors.

    Raises:
        ConfigError: a path does not exist, or validation rows are also training rows.
    """

    def __init__(
        self, path: Paths | None, val_path: Paths | None, name: str | None, split: str, val_split: str | None,
        chat_template: str | None, limits: Limits, what: str,
    ) -> None:
        if not path:
            raise ConfigError(f"`data.path` must be given: .json, .jsonl or .parquet files of {what}, or a hub set.")
        self.path, self.limits, self.what, self.skipped = path, limits, what, limits.skipped
        self.chat_template: ChatTemplate | None = None
        if chat_template is not None:
            file = path_of(chat_template, "data.chat_template")
            self.chat_template = ChatTemplate({"default": read_text(file, _TEMPLATE_LIMIT)}, chat_template)
        self._origins = Origins()
        self.rows: dict[Split, Rows] = {"train": self._open(path, "data.path", name, split)}
        if val_path or val_split:
            key = "data.val_path" if val_path else "data.val_split"
            self.rows["validation"] = self._open(val_path or path, key, name, val_split or split)
        self.has_validation = "validation" in self.rows

    def parsed(self, split: Split, parse: Callable[[Mapping[str, Any], int, str], Iterable[T]]) -> Iterator[T]:
        """`parse(row, number, place)` of each row, one after the other."""
        for number, (where, row) in enumerate(self.rows[split]()):
            found: list[T] = []
            with self.limits.row(where):
                found = list(parse(_plain(row), number, where))
            yield from found

    def identity(self) -> str:
        return self.limits.identity + " ".join(self._origins.known)

    def describe(self) -> str:
        return f"{self.what} of {self.path if isinstance(self.path, str) else ', '.join(self.path)}"

    # ------------------------------------------------------------------------------------------------------------- open

    def _open(self, path: Paths, key: str, name: str | None, split: str) -> Rows:
        names = listed(path)
        if len(names) == 1 and _is_hub_name(names[0]):
            return self._set(names[0], key, name, split)
        files = find_files(path, key, KINDS, self.what)
        for file in files:
            if not file.name.removesuffix(".gz").removesuffix(".zst").endswith(KINDS):
                raise ConfigError(f"`{key}` must be {', '.join(KINDS)} files of {self.what}, but {file} is another.")
        self._origins.add_files(files, key)
        return lambda: (row for file in files for row in objects_of(file, key, self.limits))

    def _set(self, path: str, key: str, name: str | None, split: str) -> Rows:
        with set_errors(key, path, split, f"files of {self.what} or what load_dataset takes"):
            rows = load_dataset(path, name, split)
        self._origins.add_set(path, name, split, rows, key)
        return lambda: rows_of_set(rows, path, key, self.limits)


class Chats(ConversationRows):
    """One conversation per row; several of self-instruct and of trees.

    Args:
        path and so on: as ConversationRows.
        seq_len: tokens per sample, at most; further turns are left out.
    """

    def __init__(
        self, path: Paths | None, val_path: Paths | None, name: str | None, split: str, val_split: str | None,
        format: Format, chat_template: str | None, train_on: TrainOn, seq_len: int, max_expansion: float,
        max_text_bytes: int, encoding_errors: str = Limits().encoding_errors, bad_rows: str = "refuse",
    ) -> None:
        limits = Limits(max_expansion, max_text_bytes, encoding_errors, {} if bad_rows == "skip" else None)
        super().__init__(path, val_path, name, split, val_split, chat_template, limits, "conversations")
        self.format, self.train_on, self.seq_len = format, train_on, seq_len

    def conversations(self, split: Split) -> Iterator[Conversation]:
        return self.parsed(split, lambda row, number, where: conversations(row, self.format, number, where))

    def documents(self, split: Split) -> Iterator[str]:
        """The text of the conversations, to train a tokenizer on."""
        for talk in self.conversations(split):
            yield "\n".join(turn["content"] for turn in talk.messages if isinstance(turn.get("content"), str))

    def marked(self, split: Split, tokenizer: Tokenizer) -> Iterator[Marked]:
        n_without = n_all = 0
        with Template(tokenizer) as template:
            speaker = Speaker(tokenizer, template, self.train_on, self.seq_len)
            for talk in self.conversations(split):
                samples = speaker.samples(talk)
                n_all, n_without = n_all + 1, n_without + (not samples)
                yield from samples
        if speaker.left_out or n_without:
            log.warning(
                "%s: %d turns that end beyond data.seq_len=%d are left out; %d of %d conversations train nothing",
                split,
                speaker.left_out,
                self.seq_len,
                n_without,
                n_all,
            )

    def identity(self) -> str:
        return f"{FORMAT} {self.format} {self.train_on} {self.seq_len} {super().identity()}"


def _plain(value: Any) -> Any:
    """A row as JSON holds it, as which a template gets it: dates as text, decimals as numbers, of bytes how many."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return {"bytes": len(value)}
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _is_hub_name(name: str) -> bool:
    """Whether a name is NAME or OWNER/NAME, and no local file."""
    local = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(KINDS) or set(name) & set("[*?")
    return not local and not Path(name).exists()

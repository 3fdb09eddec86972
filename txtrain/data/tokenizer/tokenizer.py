"""Text to token ids and back: one class over a `tokenizers.Tokenizer`, whatever file it came from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from txtrain.data.sources.files import Text, chunks_of
from txtrain.data.tokenizer.cuts import byte_level_places, cut
from txtrain.errors import ConfigError
from txtrain.ground.plain_files import shorten

END_OF_TEXT = "<|endoftext|>"
N_BYTES = 256
_ROLES = ("bos_token", "eos_token", "pad_token")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")  # that `Tokenizer.save` writes

_OTHER_NAMES = {"[MASK]": ("<mask>",), "[CLS]": ("<s>",), "[SEP]": ("</s>",)}  # RoBERTa's

# The user's own setting wins over ours; read before we ever write it.
_USER_PARALLELISM = os.environ.get("TOKENIZERS_PARALLELISM")


def allow_threads(allow: bool) -> None:
    """Threads while tokenising; none declared before worker processes are forked, else each of them would print a warning."""
    if _USER_PARALLELISM is None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if allow else "false"


@contextmanager
def told(what: str) -> Iterator[None]:
    """What the library says of a tokenizer that it cannot use, as ours; it has no error of its own for it, and may panic."""
    try:
        yield
    except ConfigError:
        raise
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise ConfigError(f"`data.tokenizer` must be a tokenizer, but cannot {what}: {shorten(e)}.") from e


class ChatTemplate(NamedTuple):
    """Jinja templates by name: `default`, perhaps `tool_use` for talk with tools. where: the file, for errors."""

    texts: Mapping[str, str]
    where: str


class Tokenizer:
    """Encodes text as text: a special token's name that stands in it is spelt out, and no specials are added.

    Special ids are put in by whoever builds a sequence: `bos_id` before a document, `eos_id` after it.

    Args:
        chat_template: that its files bring.
        names: of special tokens by role (`eos_token`, ...), as its files say and a template reads them; None: of the ids.
    """

    def __init__(
        self,
        backend: Any,
        eos_id: int,
        bos_id: int | None = None,
        pad_id: int | None = None,
        chat_template: ChatTemplate | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend, self.eos_id, self.bos_id, self.pad_id = backend, eos_id, bos_id, pad_id
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        roles = dict(zip(_ROLES, (bos_id, eos_id, pad_id), strict=True))
        self.chat_template = chat_template
        of_ids = {role: backend.id_to_token(i) for role, i in roles.items() if i is not None}
        self.names = of_ids if names is None else names

    def encode(self, text: str) -> list[int]:
        with told("encode this text"):
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
            return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """On all cores: several times faster than one text after another."""
        with told("encode these texts"):
            return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def as_written(self, text: str) -> Any:
        """The `tokenizers.Encoding` (`ids`, `offsets`) of a text with special tokens by name, as templates write it."""
        with told("encode this text"):
            return self._of_written.encode(text, add_special_tokens=False)

    @cached_property
    def _of_written(self) -> Any:
        return type(self.backend).from_str(self.backend.to_str())

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Tokens beside the text's own, such as those that end a turn."""
        return frozenset(self.backend.get_added_tokens_decoder())

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Text; special tokens are left out, or with `special` written as their names."""
        with told("decode these tokens"):
            text: str = self.backend.decode(list(ids), skip_special_tokens=not special)
            return text

    def find(self, name: str) -> int | None:
        """The id of a special token such as [MASK], also where the vocabulary has it under another usual name."""
        found = (self.backend.token_to_id(n) for n in (name, *_OTHER_NAMES.get(name, ())))
        return next((i for i in found if i is not None), None)

    def id_of(self, name: str) -> int:
        """As `find`, for a token that is known to be there."""
        found = self.find(name)
        assert found is not None, name
        return found

    def with_specials(self, names: Iterable[str]) -> Tokenizer:
        """This one, or one with the missing special tokens behind its vocabulary, in the order of `names`."""
        missing = [name for name in names if self.find(name) is None]
        if not missing:
            return self
        backend = type(self.backend).from_str(self.backend.to_str())
        backend.add_special_tokens(missing)
        return Tokenizer(backend, self.eos_id, self.bos_id, self.pad_id, self.chat_template, self.names)

    def with_template(self, template: ChatTemplate) -> Tokenizer:
        return Tokenizer(self.backend, self.eos_id, self.bos_id, self.pad_id, template, self.names)

    def special_ids(self) -> set[int]:
        added = self.backend.get_added_tokens_decoder()
        named = {i for i in (self.bos_id, self.eos_id, self.pad_id) if i is not None}
        return named | {i for i, token in added.items() if token.special}

    def token_bytes(self) -> NDArray[np.int32]:
        """int32 [vocab_size]: UTF-8 bytes of text that each token stands for; 0 for special tokens and unused ids.

        For tokenizers that lose text (lower-casing, unknown words) it is the text that they decode to.
        """
        kind = self.alphabet
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            sizes[i] = _n_bytes(token, kind)
        sizes[list(self.special_ids())] = 0
        return sizes

    @property
    def alphabet(self) -> str:
        """How the vocabulary writes text: its decoder's type, the first one in a sequence."""
        decoder = json.loads(self.backend.to_str())["decoder"] or {"type": "none"}
        if decoder["type"] == "Sequence":
            decoder = next(iter(decoder["decoders"]), {"type": "none"})
        return str(decoder["type"])

    @property
    def fingerprint(self) -> str:
        named = f"{self.bos_id} {self.eos_id} {self.pad_id}"
        return hashlib.sha256(self.backend.to_str().encode() + named.encode()).hexdigest()[:16]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """tokenizer.json, tokenizer_config.json and the chat template, as `transformers` reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        named |= {f"{name}_token": self.find(f"[{name.upper()}]") for name in ("mask", "cls", "sep")}
        config = {name: self.backend.id_to_token(i) for name, i in named.items() if i is not None}
        if self.chat_template is not None:  # it reads these, and may ask whether there is one
            config = dict(self.names)
            for name, text in self.chat_template.texts.items():
                other = f"additional_chat_templates/{name}.jinja"
                place = folder / ("chat_template.jinja" if name == "default" else other)
                place.parent.mkdir(exist_ok=True)
                place.write_bytes(text.encode())
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")  # its own `save` says a full disk its own way
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}, indent=2) + "\n")


def _n_bytes(token: str, alphabet: str) -> int:
    if alphabet == "ByteLevel":
        return len(token)  # one character stands for one byte
    if alphabet == "WordPiece":
        return len(token[2:].encode()) if token.startswith("##") else len(token.encode()) + 1  # and the space before a word
    if len(token) == 6 and token.startswith("<0x"):
        return 1
    return len(token.replace("▁", " ").encode())


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes of UTF-8; 256 begins and ends a document."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.BPE({char: byte for byte, char in enumerate(byte_alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend, eos_id=N_BYTES, bos_id=N_BYTES)


def byte_alphabet() -> list[str]:
    """The printable character that byte-level vocabularies write for each byte (GPT-2): itself where it has a glyph, else from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(N_BYTES)]


def train_tokenizer(texts: Iterable[Text], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, 1508.07909; over bytes: GPT-2) of at most `vocab_size` tokens; fewer if the text has no more
    pairs to merge. Id 0 begins and ends a document. The same texts give the same tokenizer."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=byte_alphabet(), show_progress=False)
    allow_threads(True)
    backend.train_from_iterator(_lines(texts), trainer)
    return Tokenizer(backend, eos_id=0, bos_id=0)


def _lines(texts: Iterable[Text]) -> Iterator[list[str]]:
    """Batches of lines: the trainer counts words on all cores, and a single long document would stay on one."""
    for text in texts:
        for piece in cut(chunks_of(text), byte_level_places):
            yield piece.splitlines(keepends=True)

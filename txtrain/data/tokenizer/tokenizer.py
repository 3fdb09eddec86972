"""Text to token ids and back: a wrapper of `tokenizers.Tokenizer`, whatever file it came from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from txtrain.data.sources.files import Text, chunks_of
from txtrain.data.tokenizer.cuts import byte_level_places, cut
from txtrain.data.tokenizer.folder import CHAT_TEMPLATES
from txtrain.data.tokenizer.limits import MAX_IDS, check_frame
from txtrain.errors import ConfigError, shorten
from txtrain.ground import files
from txtrain.ground.plain_files import parse_json

END_OF_TEXT = "<|endoftext|>"
N_BYTES = 256
_ROLES = ("bos_token", "eos_token", "pad_token")
_SETTINGS = ("padding_side", "truncation_side", "model_max_length", "clean_up_tokenization_spaces")

_OTHER_NAMES = {"[MASK]": ("<mask>",), "[CLS]": ("<s>",), "[SEP]": ("</s>",)}  # RoBERTa's

# The user's setting wins over ours; read before we write it.
_USER_PARALLELISM = os.environ.get("TOKENIZERS_PARALLELISM")


def allow_threads(allow: bool) -> None:
    """Threads for tokenising; disallow them before worker processes are forked, or each of them prints a warning."""
    if _USER_PARALLELISM is None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if allow else "false"


@contextmanager
def told(what: str) -> Iterator[None]:
    """The library's errors about an unusable tokenizer, as ours; it has no class for them, and may panic."""
    try:
        yield
    except ConfigError:
        raise
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise ConfigError(f"`data.tokenizer` must be a tokenizer, but cannot {what}: {shorten(e)}.") from e


class ChatTemplate(NamedTuple):
    """Jinja templates by name: `default`, and possibly `tool_use`. where: the file, for errors."""

    texts: Mapping[str, str]
    where: str


class Frame(NamedTuple):
    """The special tokens around one text or two. specials, types: before each text, and after the last; their segments.

    of_texts: the segment of each text.
    """

    specials: tuple[tuple[int, ...], ...]
    types: tuple[tuple[int, ...], ...]
    of_texts: tuple[int, ...]

    @property
    def n_specials(self) -> int:
        return sum(map(len, self.specials))

    def around(self, texts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """Ids and segments of the whole."""
        ids, types = list(self.specials[0]), list(self.types[0])
        for k, text in enumerate(texts):
            ids += [*text, *self.specials[k + 1]]
            types += [*[self.of_texts[k]] * len(text), *self.types[k + 1]]
        return ids, types


class Tokenizer:
    """Encodes text without special tokens: none is added, and the name of one in the text is encoded as text.

    Whoever builds a sequence adds special ids: `bos_id` before a document, `eos_id` after it.

    Args:
        chat_template: of the tokenizer's files.
        names: special tokens by role (`eos_token`, ...) for the chat template; None: those of the ids.
        files: name -> content of the files that it was read from, which `save` writes again.
    """

    def __init__(
        self,
        backend: Any,
        eos_id: int,
        bos_id: int | None = None,
        pad_id: int | None = None,
        chat_template: ChatTemplate | None = None,
        names: Mapping[str, str] | None = None,
        files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend, self.eos_id, self.bos_id, self.pad_id = backend, eos_id, bos_id, pad_id
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        if self.vocab_size > MAX_IDS:
            raise ConfigError(
                f"`data.tokenizer` must have at most {MAX_IDS:,} ids, but its largest one is {self.vocab_size - 1:,}."
            )
        roles = dict(zip(_ROLES, (bos_id, eos_id, pad_id), strict=True))
        self.chat_template = chat_template
        of_ids = {role: backend.id_to_token(i) for role, i in roles.items() if i is not None}
        self.names = of_ids if names is None else names
        self.files, self.settings = files, _settings(files)

    def encode(self, text: str) -> list[int]:
        with told("encode this text"):
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
            return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode on all cores: several times faster than one by one."""
        with told("encode these texts"):
            return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def as_written(self, text: str) -> Any:
        """The `tokenizers.Encoding` (`ids`, `offsets`) of a text in which templates wrote special tokens by name."""
        with told("encode this text"):
            return self._of_written.encode(text, add_special_tokens=False)

    @property
    def padding_id(self) -> int:
        """The token that fills rows."""
        return self.eos_id if self.pad_id is None else self.pad_id

    @cached_property
    def _of_written(self) -> Any:
        return type(self.backend).from_str(self.backend.to_str())

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids of added tokens, such as those that end a turn."""
        return frozenset(self.backend.get_added_tokens_decoder())

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text; special tokens are left out, or with `special` written by name."""
        with told("decode these tokens"):
            text: str = self.backend.decode(list(ids), skip_special_tokens=not special)
            return text

    def find(self, name: str) -> int | None:
        """The id of a special token such as [MASK], or of its usual other name."""
        found = (self.backend.token_to_id(n) for n in (name, *_OTHER_NAMES.get(name, ())))
        return next((i for i in found if i is not None), None)

    def id_of(self, name: str) -> int:
        """As `find`, for a token that is known to exist."""
        found = self.find(name)
        assert found is not None, name
        return found

    def with_specials(self, names: Iterable[str]) -> Tokenizer:
        """This tokenizer, or one with the missing special tokens appended to its vocabulary in the given order."""
        missing = [name for name in names if self.find(name) is None]
        if not missing:
            return self
        backend = type(self.backend).from_str(self.backend.to_str())
        backend.add_special_tokens(missing)
        made = Tokenizer(backend, self.eos_id, self.bos_id, self.pad_id, self.chat_template, self.names)
        made.settings = self.settings  # of the files, which describe another vocabulary
        return made

    def with_template(self, template: ChatTemplate) -> Tokenizer:
        files = {name: content for name, content in self.files.items() if not name.startswith(CHAT_TEMPLATES)}
        files |= _template_files(template) if files else {}
        return Tokenizer(self.backend, self.eos_id, self.bos_id, self.pad_id, template, self.names, files)

    def framed(self, topology: str) -> Tokenizer:
        """This tokenizer, with special tokens around texts that are read as a whole, and with a padding token.

        Special tokens are those of its own files, if they say which; else an encoder reads [CLS] a [SEP] b [SEP], a
        decoder beside an encoder a </s> b </s>, a decoder alone <s> a </s> b: its last token, which is classified, is
        of the text.
        """
        backend = type(self.backend).from_str(self.backend.to_str())
        if not backend.num_special_tokens_to_add(True):
            from tokenizers import processors

            written = {i: str(backend.id_to_token(i)) for i in (self.eos_id, self.bos_id) if i is not None}
            end, begin = written[self.eos_id], "" if self.bos_id is None else written[self.bos_id]
            single, pair = {
                "encoder": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
                "encoder_decoder": (f"$A {end}", f"$A {end} $B {end}"),
                "decoder": (f"{begin} $A".strip(), f"{begin} $A {end} $B".strip()),
            }[topology]
            names = [name for name in single.split() + pair.split() if "$" not in name]
            known = {name.partition(":")[0] for name in names}
            ids = [(name, self.id_of(name)) for name in sorted(known)]
            added = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
            own = backend.post_processor
            backend.post_processor = added if own is None else processors.Sequence([own, added])
        # not beside an encoder: there the padding token also begins the decoder's input
        pad_id = self.eos_id if self.pad_id is None and topology != "encoder_decoder" else self.pad_id
        return Tokenizer(backend, self.eos_id, self.bos_id, pad_id, self.chat_template, self.names)

    def frame(self, n_texts: int) -> Frame:
        """The special tokens that its files put around one text or two."""
        word = "a" if self.encode("a") else next((w for w in self.backend.get_vocab() if self.encode(w)), "a")
        with told("put special tokens around a text"):
            found = self.backend.encode(*[word] * n_texts, add_special_tokens=True)
        check_frame(found.ids, {*found.sequence_ids}, n_texts, self.vocab_size)
        specials: list[list[int]] = [[] for _ in range(n_texts + 1)]
        types: list[list[int]] = [[] for _ in range(n_texts + 1)]
        of_texts = [0] * n_texts
        text = -1
        for i, kind, number in zip(found.ids, found.type_ids, found.sequence_ids, strict=True):
            if number is None:
                specials[text + 1].append(i)
                types[text + 1].append(kind)
            else:
                text, of_texts[number] = number, kind
        return Frame(tuple(map(tuple, specials)), tuple(map(tuple, types)), tuple(of_texts))

    def special_ids(self) -> set[int]:
        added = self.backend.get_added_tokens_decoder()
        named = {i for i in (self.bos_id, self.eos_id, self.pad_id) if i is not None}
        return named | {i for i, token in added.items() if token.special}

    def token_bytes(self) -> NDArray[np.int32]:
        """int32 [vocab_size]: UTF-8 bytes of text per token; 0 for special tokens and unused ids.

        For tokenizers that lose text (lower-casing, unknown words) it is the decoded text.
        """
        kind = self.alphabet
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            sizes[i] = _n_bytes(token, kind)
        sizes[list(self.special_ids())] = 0
        return sizes

    @property
    def alphabet(self) -> str:
        """How the vocabulary writes text: the type of its (first) decoder."""
        decoder = json.loads(self.backend.to_str())["decoder"] or {"type": "none"}
        if decoder["type"] == "Sequence":
            decoder = next(iter(decoder["decoders"]), {"type": "none"})
        return str(decoder["type"])

    @property
    def fingerprint(self) -> str:
        named = f"{self.bos_id} {self.eos_id} {self.pad_id}"
        return hashlib.sha256(self.backend.to_str().encode() + named.encode()).hexdigest()[:16]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """The files that it was read from, byte for byte; and where they were not among them tokenizer.json and
        tokenizer_config.json, as `transformers` reads them, and the chat template."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        named |= {f"{name}_token": self.find(f"[{name.upper()}]") for name in ("mask", "cls", "sep")}
        config = {name: self.backend.id_to_token(i) for name, i in named.items() if i is not None}
        if self.chat_template is not None:  # templates read these, and may ask whether there is one
            config = dict(self.names)
            if not self.files:
                write_files(folder, _template_files(self.chat_template))
        config |= self.settings
        # Not by the backend's `save`, which reports a full disk by an error of its own.
        said = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}, indent=2) + "\n"
        made = {"tokenizer.json": self.backend.to_str(pretty=True), "tokenizer_config.json": said}
        write_files(folder, {**{name: text.encode() for name, text in made.items()}, **self.files})


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files by name, which may lie one folder deeper."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with files.new(folder / name) as f:
            f.write(content)


def _template_files(template: ChatTemplate) -> dict[str, bytes]:
    default, other = CHAT_TEMPLATES
    names = {name: default if name == "default" else f"{other}/{name}.jinja" for name in template.texts}
    return {names[name]: text.encode() for name, text in template.texts.items()}


def _settings(contents: Mapping[str, bytes]) -> dict[str, Any]:
    """What a tokenizer_config.json says that does not depend on the vocabulary."""
    raw = contents.get("tokenizer_config.json")
    said = {} if raw is None else parse_json(raw, "tokenizer_config.json")
    return {name: said[name] for name in _SETTINGS if name in said}


def _n_bytes(token: str, alphabet: str) -> int:
    if alphabet == "ByteLevel":
        return len(token)  # one character per byte
    if alphabet == "WordPiece":  # + 1: the space before a word
        return len(token[2:].encode()) if token.startswith("##") else len(token.encode()) + 1
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
    """GPT-2's printable character for each byte: itself if it has a glyph, else one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(N_BYTES)]


def train_tokenizer(texts: Iterable[Text], vocab_size: int, share: float = 1.0) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, 1508.07909; over bytes: GPT-2) of at most `vocab_size` tokens.

    Fewer if the text has no more pairs to merge. Id 0 begins and ends a document. Deterministic. share: of the pieces
    of the texts that are read, evenly from all of them.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=byte_alphabet(), show_progress=False
    )
    allow_threads(True)
    backend.train_from_iterator(_lines(texts, share), trainer)
    return Tokenizer(backend, eos_id=0, bos_id=0)


def _lines(texts: Iterable[Text], share: float) -> Iterator[list[str]]:
    """Batches of lines, so that the trainer counts the words of long documents on all cores."""
    pieces = (piece for text in texts for piece in cut(chunks_of(text), byte_level_places))
    for i, piece in enumerate(pieces):
        if int((i + 1) * share) > int(i * share):
            yield piece.splitlines(keepends=True)

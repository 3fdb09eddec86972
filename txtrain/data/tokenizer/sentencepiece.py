"""SentencePiece models (`tokenizer.model`, `spiece.model`) as `tokenizers` objects, without the sentencepiece package.

A model is one protobuf message, of which four fields matter here (protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from txtrain.data.tokenizer.limits import check_table
from txtrain.errors import ConfigError
from txtrain.ground.plain_files import read_bytes

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.model_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # SentencePiece.type
_SPACE = "▁"
_LARGEST = 50_000_000  # bytes; the largest vocabularies have 5 million
_LONGEST = 256  # characters of a piece; the trainer's default is 16


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


class Model(NamedTuple):
    pieces: list[Piece]
    kind: int
    charsmap: bytes  # a compiled table of Unicode normalisations
    add_dummy_prefix: bool  # a space before the text
    remove_extra_whitespaces: bool


def read(path: Path) -> Model:
    """Raises ConfigError if the file is not a SentencePiece model."""
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(read_bytes(path, _LARGEST)):
            if number == 1:
                message = dict(_fields(value))
                (score,) = struct.unpack("<f", message.get(2, b"\0\0\0\0"))
                text = message.get(1, b"").decode()
                if len(text) > _LONGEST:
                    raise ValueError(f"a piece of {len(text)} characters")
                pieces.append(Piece(text, score, message.get(3, _NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except (IndexError, ValueError, TypeError, AttributeError, struct.error):
        pieces = []
    charsmap = normalizer.get(2, b"")
    if not isinstance(charsmap, bytes) or not any(piece.kind == _UNKNOWN for piece in pieces):
        raise ConfigError(f"`data.tokenizer` must be a tokenizer, but {path} is not a SentencePiece model.")
    return Model(pieces, trainer.get(3, _UNIGRAM), charsmap, bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)))


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: an int, or bytes of a fixed-width field, a string or a message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while at < len(message):
        key = varint()
        wire_type = key & 7
        if wire_type == 0:
            yield key >> 3, varint()
            continue
        if wire_type not in (1, 2, 5):
            raise ValueError(f"wire type {wire_type}")
        size = {1: 8, 5: 4}.get(wire_type) or varint()
        if at + size > len(message):
            raise ValueError("the message ends early")
        yield key >> 3, message[at : at + size]
        at += size


def convert(path: Path) -> Any:
    """A `tokenizers.Tokenizer` that encodes as the SentencePiece model does.

    Raises:
        ConfigError: it is no SentencePiece model, or neither BPE nor unigram.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers

    model = read(path)
    if model.kind not in (_UNIGRAM, _BPE):
        raise ConfigError(f"`data.tokenizer`: {path} must be a SentencePiece model, BPE or unigram, but is neither.")
    if model.charsmap:
        check_table(model.charsmap, str(path))
    backend = Tokenizer(_bpe(model) if model.kind == _BPE else _unigram(model))
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(_SPACE)] if model.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens(
        [AddedToken(p.text, normalized=False, special=True) for p in model.pieces if p.kind in (_UNKNOWN, _CONTROL)]
    )
    backend.add_tokens([AddedToken(p.text, normalized=False) for p in model.pieces if p.kind == _USER_DEFINED])
    return backend


def _unknown(model: Model) -> int:
    return next(i for i, p in enumerate(model.pieces) if p.kind == _UNKNOWN)


def _unigram(model: Model) -> Any:
    from tokenizers import models

    has_bytes = any(p.kind == _BYTE for p in model.pieces)
    return models.Unigram([(p.text, p.score) for p in model.pieces], unk_id=_unknown(model), byte_fallback=has_bytes)


def _bpe(model: Model) -> Any:
    """SentencePiece merges the pair whose union has the best score; `tokenizers` wants a list of pairs, best first."""
    from tokenizers import models

    ids = {p.text: i for i, p in enumerate(model.pieces)}
    mergeable = {p.text for p in model.pieces if p.kind == _NORMAL}
    merges = [
        (-model.pieces[ids[whole]].score, ids[whole], ids[whole[:cut]], whole[:cut], whole[cut:])
        for whole in mergeable
        for cut in range(1, len(whole))
        if whole[:cut] in mergeable and whole[cut:] in mergeable
    ]
    has_bytes = any(p.kind == _BYTE for p in model.pieces)
    unknown = model.pieces[_unknown(model)].text
    return models.BPE(
        ids, [pair[3:] for pair in sorted(merges)], unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes
    )

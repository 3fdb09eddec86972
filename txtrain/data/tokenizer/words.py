"""Where words begin, by what each token of the vocabulary begins and ends with."""

from __future__ import annotations

import dataclasses as dc

import numpy as np
from numpy.typing import NDArray

from txtrain.data.tokenizer.tokenizer import Tokenizer, byte_alphabet

Flags = NDArray[np.bool_]


@dc.dataclass(frozen=True)
class Words:
    """Whether a token begins, and ends, within a word: [vocabulary]. Special tokens do neither."""

    begins_inside: Flags
    ends_inside: Flags

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Words:
        alphabet = tokenizer.alphabet
        begins, ends = (np.zeros(tokenizer.vocab_size, dtype=np.bool_) for _ in range(2))
        for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items():
            begins[i], ends[i] = _sides(token, alphabet)
        special = list(tokenizer.special_ids())
        begins[special] = ends[special] = False
        return cls(begins, ends)

    def first(self, ids_BT: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B, T]: the position of the first token of each token's word.

        A token continues a word if it begins within a word and the token before it ends within one: letters after
        letters. So vocabularies of all kinds (a leading space, `##`) work, and punctuation stands alone.
        """
        T = ids_BT.shape[1]
        goes_on = np.zeros(ids_BT.shape, dtype=np.bool_)
        goes_on[:, 1:] = self.begins_inside[ids_BT[:, 1:]] & self.ends_inside[ids_BT[:, :-1]]
        return np.maximum.accumulate(np.where(goes_on, 0, np.arange(T)), axis=1)


_BYTE_OF = {char: byte for byte, char in enumerate(byte_alphabet())}


def _sides(token: str, alphabet: str) -> tuple[bool, bool]:
    if alphabet == "WordPiece":
        return token.startswith("##"), token[-1:].isalnum()
    if alphabet == "ByteLevel":
        raw = [_BYTE_OF.get(char, ord(" ")) for char in (token[:1], token[-1:])]
        first, last = (byte >= 0x80 or chr(byte).isalnum() for byte in raw)  # >= 0x80: part of a letter beyond ASCII
        return first, last
    if len(token) == 6 and token.startswith("<0x"):
        return True, True
    return token[:1].isalnum(), token[-1:].isalnum()

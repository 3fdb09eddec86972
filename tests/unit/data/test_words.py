import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.data.tokenizer.tokenizer import Tokenizer, byte_tokenizer, train_tokenizer
from txtrain.data.tokenizer.words import Words

TEXT = "Understanding, misunderstandings; do re-understand naïveté 2024"


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    """The text of each group of tokens that share their first."""
    ids = np.array([tokenizer.encode(text)])
    first = Words.of(tokenizer).first(ids)[0]
    return [tokenizer.decode(ids[0, first == f].tolist()) for f in sorted(set(first.tolist()))]


def test_letters_go_on_with_letters_whatever_the_pieces_are():
    said = ["Understanding", ",", " ", "misunderstandings", ";", " ", "do", " ", "re", "-", "understand", " ", "naïveté", " ", "2024"]
    assert words(byte_tokenizer(), TEXT) == said
    trained = train_tokenizer([TEXT] * 3 + ["under stand ing mis s"], 290)
    assert [w.strip() for w in words(trained, TEXT) if w.strip()] == [w for w in said if w.strip()]


def test_word_pieces_go_on_where_they_say_so():
    backend = Backend(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "under": 2, "##stand": 3, "##ing": 4, "stand": 5, ",": 6}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[SEP]"])
    made = Tokenizer(backend, eos_id=1)
    assert Words.of(made).first(np.array([[2, 3, 4, 5, 6, 1, 3]])).tolist() == [[0, 0, 0, 3, 4, 5, 6]]


@pytest.mark.parametrize("name", ["[MASK]", "<extra_id_0>"])
def test_special_tokens_are_no_part_of_words(name):
    made = byte_tokenizer().with_specials([name])
    ids = np.array([[*made.encode("ab"), made.id_of(name), *made.encode("cd")]])
    assert Words.of(made).first(ids).tolist() == [[0, 0, 2, 3, 3]]


def test_missing_special_tokens_come_behind_the_vocabulary_and_stay(tmp_path):
    plain = byte_tokenizer()
    made = plain.with_specials(["[CLS]", "[MASK]"])
    assert (plain.vocab_size, made.vocab_size, made.id_of("[CLS]"), made.id_of("[MASK]")) == (257, 259, 257, 258)
    assert made.with_specials(["[MASK]"]) is made
    assert made.fingerprint != plain.fingerprint
    assert made.decode(made.encode("[MASK] x")) == "[MASK] x", "text that looks like a special token stays text"
    made.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.id_of("[MASK]"), again.special_ids(), again.fingerprint) == (258, {256, 257, 258}, made.fingerprint)
    assert again.token_bytes()[256:].tolist() == [0, 0, 0]

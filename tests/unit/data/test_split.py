import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from txtrain.data.store.split import Corpus, is_held_out, split_documents


def parts(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    made = list(split_documents(lambda: iter(texts), fraction))
    return [t for s, t in made if s == "train"], [t for s, t in made if s == "validation"]


@given(fraction=st.sampled_from([0.01, 0.05, 0.1, 1 / 3, 0.5, 0.9]))
def test_held_out_documents_are_the_fraction_in_every_stretch(fraction: float) -> None:
    held = np.array([is_held_out(k, fraction) for k in range(3000)])
    for begin in range(0, 3000, 500):
        count = held[begin : begin + 500].sum()
        assert abs(count - 500 * fraction) <= 2, f"{count} of 500 from {begin} on"


def test_many_documents_are_divided_whole_and_none_is_in_both() -> None:
    texts = [f"document {i}" for i in range(400)]
    train, val = parts(texts, 0.05)
    assert len(val) == 20
    assert sorted(train + val) == sorted(texts)
    assert not set(train) & set(val)


def test_held_out_documents_follow_no_period() -> None:
    held = [k for k in range(2000) if is_held_out(k, 0.05)]
    assert len({k % 20 for k in held}) > 10


@pytest.mark.parametrize("n", [1, 3, 99])
def test_few_documents_give_their_ends_cut_at_a_line(n: int) -> None:
    texts = ["".join(f"document {d} line {i}\n" for i in range(200)) for d in range(n)]
    train, val = parts(texts, 0.05)
    assert len(train) == len(val) == n
    for text, head, tail in zip(texts, train, val, strict=True):
        assert head + tail == text
        assert head.endswith("\n")
        assert 0.03 < len(tail) / len(text) < 0.06, f"held out {len(tail) / len(text):.3f}"


def test_one_line_is_cut_between_words_and_one_word_not_at_all() -> None:
    train, val = parts(["word " * 100], 0.1)
    assert train[0].endswith(" ")
    assert "".join(train + val) == "word " * 100
    assert parts(["x" * 50], 0.1) == (["x" * 50], [])


def test_a_source_with_its_own_validation_is_not_divided() -> None:
    class Own:
        has_validation = True

        def documents(self, split):
            yield from (["a", "  ", "b"] if split == "train" else ["c"])

    corpus = Corpus(Own(), 0.5)
    assert list(corpus.documents()) == [("train", "a"), ("train", "b"), ("validation", "c")]
    assert list(corpus.training_texts()) == ["a", "b"]


def test_fingerprint_of_a_source_without_identity_follows_its_documents() -> None:
    class Mine:
        def __init__(self, texts):
            self.texts = texts

        def documents(self, split):
            return iter(self.texts)

    one = Corpus(Mine(["a", "bc"]), 0.1).fingerprint
    assert one == Corpus(Mine(["a", "bc"]), 0.1).fingerprint
    others = [Corpus(Mine(["ab", "c"]), 0.1), Corpus(Mine(["a", "bd"]), 0.1), Corpus(Mine(["a", "bc"]), 0.2)]
    assert len({one, *(c.fingerprint for c in others)}) == 4

"""Texts in pieces: of any length in bounded memory, with the tokens that the whole has."""

import gzip
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.conftest import SHARED
from txtrain.data.sources import files
from txtrain.data.sources.files import Limits, LongText, chunks_of, lines_of, text_of
from txtrain.data.sources.text import TextFiles
from txtrain.data.store import tokenize
from txtrain.data.store.cache import TokenFile
from txtrain.data.store.split import Corpus
from txtrain.data.store.tokenize import tokenise
from txtrain.data.tokenizer import cuts
from txtrain.data.tokenizer.cuts import cut, places_of
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.data.tokenizer.tokenizer import byte_tokenizer, train_tokenizer

CHARS = "abz'09 \n\r\t.,!-é½日。のт\u0301\u0e33\u00a0\u3000\u2581🙂"
texts = st.text(CHARS, max_size=400)


def by_the_rule_of_version_0_1_0(text: str) -> list[str]:
    """Where texts were cut before they were read in chunks: caches and fingerprints hang on it."""
    found, at = [], 0
    while len(text) - at > cuts.PIECE:
        end = text.find("\n", at + cuts.PIECE - (cuts.PIECE >> 3))
        while end > 0 and text[end - 1].isspace():
            end = text.find("\n", end + 1)
        if end <= at:
            break
        found.append(text[at:end])
        at = end
    return [*found, text[at:]]


@pytest.fixture
def short(monkeypatch):
    """Pieces so short that small texts have many."""
    monkeypatch.setattr(cuts, "PIECE", 32)
    monkeypatch.setattr(cuts, "_SMALL", 8)
    monkeypatch.setattr(files, "_CHUNK", 7)
    monkeypatch.setattr(files, "_LONG", 10)


def in_chunks(text: str, size: int):
    return (text[i : i + size] for i in range(0, len(text), size))


# the fixture changes nothing between examples
same_fixture = settings(suppress_health_check=["function_scoped_fixture"], deadline=None, max_examples=200)


@same_fixture
@given(text=texts, size=st.integers(1, 90))
def test_a_text_that_comes_in_chunks_is_cut_as_the_whole_was(short, text: str, size: int) -> None:
    assert list(cut(in_chunks(text, size), None)) == by_the_rule_of_version_0_1_0(text)


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "trained": lambda: train_tokenizer(["the cat's 90 tails, et cetera.\n" * 9, CHARS * 3], 330),
    **{
        name: lambda name=name: load_tokenizer(SHARED / "tokenizers" / name)
        for name in ("gpt2", "mistral-v1", "spm-1000", "bert-base-uncased")
    },
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    if request.param not in ("bytes", "trained") and not (SHARED / "tokenizers").exists():
        pytest.skip("needs shared/data")
    made = TOKENIZERS[request.param]()
    return made, places_of(made.backend)


@same_fixture
@given(text=texts, size=st.integers(1, 90))
def test_pieces_have_the_tokens_of_what_they_are_pieces_of(short, tokenizer, text: str, size: int) -> None:
    (tokenizer, places) = tokenizer
    assert places is not None
    pieces = list(cut(in_chunks(text, size), places))
    made = [i for ids in tokenizer.encode_batch(pieces) for i in ids]
    whole = [i for ids in tokenizer.encode_batch(by_the_rule_of_version_0_1_0(text)) for i in ids]
    assert made == whole, pieces


def test_a_text_of_words_without_lines_is_cut(short) -> None:
    pieces = list(cut(iter(["one two, three " * 100]), places_of(byte_tokenizer().backend)))
    assert len(pieces) > 50
    assert "".join(pieces) == "one two, three " * 100


def test_a_tokenizer_of_another_kind_is_not_cut_within_a_line() -> None:
    from tokenizers import Regex, pre_tokenizers

    backend = byte_tokenizer().backend
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|."), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)])
    assert places_of(backend) is None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert places_of(backend) is None


def test_a_long_text_trains_the_tokenizer_that_it_trained_as_a_whole(short) -> None:
    text = "".join(f"line {i}, it's {i * i}.\n{'' if i % 3 else ' ' * i}" for i in range(200)) + "no more lines " * 50
    long = LongText(lambda: in_chunks(text, 13))
    assert train_tokenizer([long], 330).fingerprint == train_tokenizer(text.splitlines(keepends=True), 330).fingerprint


# ------------------------------------------------------------------------------------------------------------------- files


@same_fixture
@given(text=texts, mark=st.booleans(), pack=st.booleans())
def test_a_file_in_chunks_is_the_text_of_the_file(short, tmp_path: Path, text: str, mark: bool, pack: bool) -> None:
    raw = (b"\xef\xbb\xbf" if mark else b"") + text.encode()
    path = tmp_path / ("a.txt.gz" if pack else "a.txt")
    path.write_bytes(gzip.compress(raw) if pack else raw)
    found, whole = text_of(path, "data.path", Limits()), text.replace("\r\n", "\n")
    assert "".join(chunks_of(found)) == whole
    assert list(lines_of(found)) == whole.splitlines(keepends=True)
    assert isinstance(found, LongText) == (len(whole) > 10)
    assert (len(found), found.isspace()) == (len(whole), whole.isspace())
    for begin in range(0, len(whole) + 2, 5):
        assert "".join(chunks_of(found[begin:])) == whole[begin:]
        assert "".join(chunks_of(found[:begin])) == whole[:begin]
        assert found.find("\n", begin) == whole.find("\n", begin)


@pytest.mark.parametrize("ending", ["\n", ", "])
def test_memory_does_not_grow_with_the_text(ending: str, tmp_path: Path, monkeypatch) -> None:
    for module, name in ((cuts, "PIECE"), (cuts, "_SMALL"), (files, "_CHUNK"), (files, "_LONG"), (tokenize, "_BATCH")):
        monkeypatch.setattr(module, name, getattr(module, name) >> 7)
    path, peaks = tmp_path / "a.txt", []
    tokenizer = train_tokenizer(["the cat sat on the mat" + ending], 300)
    for n in (60_000, 240_000):
        path.write_text(("the cat sat on the mat" + ending) * (n // 23))
        (tmp_path / str(n)).mkdir()
        tracemalloc.start()
        tokenise(Corpus(TextFiles(str(path)), 0.05), tokenizer, tmp_path / str(n))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(TokenFile(tmp_path / str(n), "validation")) > 100
    assert peaks[1] - peaks[0] < 40_000, f"{peaks} bytes"


@pytest.mark.parametrize("n", [1, 200])
def test_long_texts_are_divided_as_short_ones(n: int, tmp_path: Path, monkeypatch) -> None:
    for i in range(n):
        (tmp_path / f"{i:03}.txt").write_text(f"the text {i} of {n}\n" * 30)
    made = []
    for long in (files._LONG, 100):
        monkeypatch.setattr(files, "_LONG", long)
        (tmp_path / f"made{long}").mkdir()
        tokenise(Corpus(TextFiles(str(tmp_path)), 0.05), byte_tokenizer(), tmp_path / f"made{long}")
        made.append([TokenFile(tmp_path / f"made{long}", split) for split in ("train", "validation")])
    for one, other in zip(*made, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.offsets, other.offsets)

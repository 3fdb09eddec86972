import os
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest

from txtrain.data.store.cache import TokenFile, build_folder, cache_root
from txtrain.data.store.split import Corpus
from txtrain.data.store.tokenize import _PIECE, tokenise
from txtrain.data.tokenizer.tokenizer import byte_tokenizer, train_tokenizer


class Texts:
    has_validation = True

    def __init__(self, train: list[str], validation: list[str]) -> None:
        self.texts = {"train": train, "validation": validation}

    def documents(self, split):
        return iter(self.texts[split])


def test_documents_are_bos_tokens_eos_in_order(tmp_path: Path) -> None:
    tokenise(Corpus(Texts(["ab", "c"], ["d"]), 0.1), byte_tokenizer(), tmp_path)
    train, val = TokenFile(tmp_path, "train"), TokenFile(tmp_path, "validation")
    assert train.ids.tolist() == [256, 97, 98, 256, 256, 99, 256]
    assert train.offsets.tolist() == [0, 4, 7]
    assert val.document(0).tolist() == [256, 100, 256]


def test_a_long_document_in_pieces_has_the_tokens_of_the_whole(tmp_path: Path) -> None:
    lines = [f"line {i},  with  spaces.{' ' * (i % 3)}\n{chr(10) * (i % 4)}{' ' * (i % 5)}" for i in range(60_000)]
    text = "".join(lines)
    assert len(text) > 5 * _PIECE
    tokenizer = train_tokenizer([text[:10_000]], 400)
    tokenise(Corpus(Texts([text], ["x"]), 0.1), tokenizer, tmp_path)
    assert TokenFile(tmp_path, "train").n_documents == 1
    assert np.array_equal(TokenFile(tmp_path, "train").document(0)[1:-1], tokenizer.encode(text))


def test_a_long_document_without_lines_stays_whole(tmp_path: Path) -> None:
    tokenise(Corpus(Texts(["x" * (3 * _PIECE)], ["y"]), 0.1), byte_tokenizer(), tmp_path)
    assert len(TokenFile(tmp_path, "train")) == 3 * _PIECE + 2


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        build_folder(tmp_path / "root" / "made", fail)
    assert list((tmp_path / "root").iterdir()) == []


def test_a_folder_is_built_once_and_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    target = tmp_path / "made"

    def slow(folder: Path) -> None:
        (folder / "who").write_text("slow")
        build_folder(target, lambda other: (other / "who").write_text("quick"))  # another process meanwhile

    build_folder(target, slow)
    assert (target / "who").read_text() == "quick"
    build_folder(target, lambda folder: pytest.fail("built twice"))
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_leftovers_of_dead_processes_are_removed_and_of_living_ones_kept(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    host = socket.gethostname()
    dead, alive, elsewhere = (tmp_path / f".{name}.x.tmp" for name in (f"{host}.{child}", f"{host}.{os.getpid()}", "other-host.1"))
    for folder in (dead, alive, elsewhere):
        folder.mkdir()
    build_folder(tmp_path / "made", lambda folder: None)
    assert not dead.exists()
    assert alive.exists()
    assert elsewhere.exists()


def test_an_opened_file_travels_to_a_worker_as_paths(tmp_path: Path) -> None:
    tokenise(Corpus(Texts(["a" * 100_000], ["b"]), 0.1), byte_tokenizer(), tmp_path)
    tokens = TokenFile(tmp_path, "train")
    assert len(tokens.ids) == 100_002
    sent = pickle.dumps(tokens)
    assert len(sent) < 1000, f"{len(sent)} bytes"
    assert np.array_equal(pickle.loads(sent).ids, tokens.ids)


def test_cache_root_is_the_key_then_the_environment(monkeypatch) -> None:
    assert cache_root("/a") == Path("/a")
    monkeypatch.setenv("TXTRAIN_CACHE", "/b")
    assert cache_root(None) == Path("/b")
    monkeypatch.delenv("TXTRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_root(None) == Path("/c/txtrain")

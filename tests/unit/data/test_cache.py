import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from txtrain.data.store.cache import TOKEN_FILES, TokenFile, build_folder, cache_root, cached
from txtrain.data.store.split import Corpus
from txtrain.data.store.tokenize import tokenise
from txtrain.data.tokenizer.cuts import PIECE
from txtrain.data.tokenizer.tokenizer import byte_tokenizer, train_tokenizer
from txtrain.errors import ConfigError


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
    assert len(text) > 5 * PIECE
    tokenizer = train_tokenizer([text[:10_000]], 400)
    tokenise(Corpus(Texts([text], ["x"]), 0.1), tokenizer, tmp_path)
    assert TokenFile(tmp_path, "train").n_documents == 1
    assert np.array_equal(TokenFile(tmp_path, "train").document(0)[1:-1], tokenizer.encode(text))


def test_a_long_document_without_lines_stays_whole(tmp_path: Path) -> None:
    tokenise(Corpus(Texts(["x" * (3 * PIECE)], ["y"]), 0.1), byte_tokenizer(), tmp_path)
    assert len(TokenFile(tmp_path, "train")) == 3 * PIECE + 2


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


HOLD = """
import sys, time
from pathlib import Path
from txtrain.data.store.cache import build_folder
def fill(folder):
    (folder / "half").write_text("half")
    print(folder, flush=True)
    time.sleep(60)
build_folder(Path(sys.argv[1]) / "held", fill)
"""


def test_leftovers_are_removed_once_the_lock_of_their_process_is_free(tmp_path: Path) -> None:
    """Whatever their numbers: two containers with one host name have processes of the same ones."""
    older = tmp_path / ".host.1.x.tmp"
    older.mkdir()
    (older / "train.bin").write_text("of a version without locks")
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        held = Path(child.stdout.readline().strip())
        build_folder(tmp_path / "one", lambda folder: None)
        assert (held / "half").exists()
    finally:
        child.kill()
        child.wait()
    build_folder(tmp_path / "two", lambda folder: None)
    assert not held.exists()
    assert older.exists()


def test_a_shared_cache_has_the_modes_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        made = build_folder(tmp_path / "a" / "made", lambda folder: (folder / "x").write_text("x"))
    finally:
        os.umask(before)
    assert {made.stat().st_mode & 0o777, made.parent.stat().st_mode & 0o777} == {0o775}
    assert {p.name: p.stat().st_mode & 0o777 for p in made.iterdir()} == {"x": 0o664, "meta.json": 0o664}


# ----------------------------------------------------------------------------------------------------------------- damage


def cache_of(folder: Path) -> Path:
    corpus = Corpus(Texts(["ab" * 500, "c"], ["d"]), 0.1)
    return build_folder(folder / "key", lambda empty: tokenise(corpus, byte_tokenizer(), empty), TOKEN_FILES)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: os.truncate(folder / "train.bin", 1000), "train.bin has 1000 bytes instead of 2010"),
        (lambda folder: flip(folder / "train.bin"), "train.bin has changed"),
        (lambda folder: flip(folder / "validation.offsets.npy"), "validation.offsets.npy has changed"),
        *((lambda folder, name=name: (folder / name).unlink(), f"{name} is missing") for name in TOKEN_FILES),
    ],
)
def test_a_damaged_cache_is_built_anew_with_a_line(damage, said: str, tmp_path: Path, caplog) -> None:
    whole = contents(cache_of(tmp_path))
    cache_of(tmp_path)
    assert not caplog.records
    damage(tmp_path / "key")
    assert contents(cache_of(tmp_path)) == whole
    assert [f"{tmp_path / 'key'}: {said}" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("change", [('"train": 1005', '"train": 500'), ('"bytes": 2010', '"bytes": 1000'), ("uint16", "uint32")])
def test_a_cache_whose_facts_have_changed_is_refused(change: tuple[str, str], tmp_path: Path) -> None:
    meta = cache_of(tmp_path) / "meta.json"
    assert change[0] in meta.read_text()
    meta.write_text(meta.read_text().replace(*change))
    with pytest.raises(ConfigError, match=r"meta.json must be as it was written"):
        cache_of(tmp_path)


def test_a_cache_of_a_version_without_hashes_is_read_and_its_size_compared(tmp_path: Path) -> None:
    meta = cache_of(tmp_path) / "meta.json"
    meta.write_text(json.dumps({k: v for k, v in json.loads(meta.read_text()).items() if k not in ("files", "check")}))
    assert len(TokenFile(cache_of(tmp_path), "train")) == 1005
    os.truncate(meta.with_name("train.bin"), 1000)
    with pytest.raises(ConfigError, match=r"must have 1,005 tokens, as its meta.json says, but has 1,000 bytes"):
        TokenFile(cache_of(tmp_path), "train")


def test_a_cache_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for where, why in (("file/x", "file is a file"), ("link/x", "is a link to"), ("x" * 300, "name too long"), ("new/" + "x" * 300, "name too long")):
        with pytest.raises(ConfigError, match=f"`data.cache_dir` must be a folder.*{why}"):
            cached(str(tmp_path / where), "made", lambda folder: pytest.fail("it began"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]
    monkeypatch.delenv("TXTRAIN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="`HOME` must be a folder"):
        cached(None, "made", lambda folder: pytest.fail("it began"))
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    with pytest.raises(ConfigError, match=r"`HOME` must tell where ~/.cache is.*TXTRAIN_CACHE"):
        cached(None, "made", lambda folder: pytest.fail("it began"))


def test_a_disk_that_becomes_full_is_the_caches_and_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ConfigError, match=r"`data.cache_dir` must be.*No space left"):
        build_folder(tmp_path / "made", fill)
    assert not list(tmp_path.iterdir())


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

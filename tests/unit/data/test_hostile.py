"""Data from a stranger: bombs, arrays with code, headers that lie. Each is refused with its file's name and little memory."""

import gzip
import json
import pickle
import struct
import tracemalloc
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from txtrain.data.sources import documents
from txtrain.data.sources.files import Limits, chunks_of
from txtrain.data.sources.hub_text import HubDataset
from txtrain.data.sources.images import ImageFiles, SetImages
from txtrain.data.sources.labels import LabelledTexts
from txtrain.data.sources.memmap import TokenFiles
from txtrain.data.sources.text import TextFiles
from txtrain.data.sources.translation import Translation
from txtrain.data.store.cache import TokenFile, TokenWriter
from txtrain.data.tokenizer.tokenizer import byte_tokenizer
from txtrain.errors import ConfigError
from txtrain.ground import plain_files

MB = 1_000_000


def refused(do, *words: str, megabytes: int = 200) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError) as e:
            do()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    for word in words:
        assert word in str(e.value)
    assert max(map(len, e.value.problems)) < 700
    assert peak < megabytes * MB, f"{peak / MB:.0f} MB"


def read(path, **keys):
    return ["".join(chunks_of(text)) for text in TextFiles(str(path), **keys).documents("train")]


# ------------------------------------------------------------------------------------------------------------------- bombs

LONG = b"x" * (16 * MB)


@pytest.fixture
def small_floor(monkeypatch):
    """Small bombs do: what any file may have inside is a tenth of them here."""
    assert plain_files.EXPANSION_FLOOR == 64 * MB
    monkeypatch.setattr(plain_files, "EXPANSION_FLOOR", MB)


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    home = tmp_path_factory.mktemp("bombs")
    for name in ("a.txt", "b.jsonl", "c.tsv"):
        (home / f"{name}.gz").write_bytes(gzip.compress(LONG))
    (home / "a.txt.zst").write_bytes(pa.compress(LONG, codec="zstd", asbytes=True))
    (home / "images-idx3-ubyte.gz").write_bytes(gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, 16, 1000, 1000) + LONG))
    (home / "labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"", 1))
    np.savez_compressed(home / "a.npz", x=np.zeros((16, 1000, 1000), np.uint8), y=np.zeros(16, np.int64))
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), pa.array(["x" * (MB // 2)]))
    pq.write_table(pa.table({"text": text}), home / "repeated.parquet", compression="zstd", store_schema=False)
    pq.write_table(pa.table({"text": [LONG.decode()]}), home / "long.parquet", compression="zstd")
    return home


@pytest.mark.parametrize("name", ["a.txt.gz", "b.jsonl.gz", "a.txt.zst", "repeated.parquet", "long.parquet"])
def test_a_text_that_unpacks_to_far_more_than_itself_is_refused(name, bombs, small_floor):
    refused(lambda: read(bombs / name), name, "data.max_expansion", megabytes=12)


def test_pairs_and_images_have_the_same_limit(bombs, small_floor):
    tsv = Translation(str(bombs / "c.tsv.gz"), None, None, None, None, "train", None, None, False)
    refused(lambda: list(tsv.pairs("train")), "c.tsv.gz", "data.max_expansion")
    for name in ("a.npz", "images-idx3-ubyte.gz"):
        images = (str(bombs / name), None, None, None, None, "train", None, ("image", "label"))
        refused(lambda images=images: ImageFiles(*images), name, "data.max_expansion", megabytes=12)


def test_the_limit_is_a_key(bombs, small_floor):
    assert len(read(bombs / "a.txt.gz", max_expansion=2000.0)[0]) == len(LONG)


def test_below_64_mb_the_ratio_does_not_count(bombs):
    assert len(read(bombs / "a.txt.gz")[0]) == len(LONG)


def test_one_text_has_a_limit_of_its_own(tmp_path):
    limits = {"max_text_bytes": 1000}
    (tmp_path / "a.txt").write_text("x" * 1001)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x" * 10}) + "\n" + json.dumps({"text": "x" * 1000}) + "\n")
    pq.write_table(pa.table({"text": ["x", "x" * 1001]}), tmp_path / "c.parquet")
    for name, place in (("a.txt", "a.txt"), ("b.jsonl", "line 2 of"), ("c.parquet", "row 2 of")):
        refused(lambda name=name: read(tmp_path / name, **limits), name, place, "data.max_text_bytes")
        assert read(tmp_path / name, max_text_bytes=2000)
    rows = HubDataset(str(tmp_path / "b.jsonl"), None, "train", None, None, "text")
    rows.limits = rows.limits._replace(max_text_bytes=999)
    refused(lambda: list(rows.documents("train")), "b.jsonl", "data.max_text_bytes")


# -------------------------------------------------------------------------------------------------------------------- rows

ROWS = {
    "deep": b'{"text": ' + b"[" * 100_000,
    "deep elsewhere": b'{"text": "a", "n": ' + b"[" * 500 + b"]" * 500 + b"}",
    "half a character": b'{"text": "\\ud83d"}',
    "a name twice": b'{"text": "a", "text": "b"}',
    "a list": b'{"text": ["' + b"x" * 100_000 + b'"]}',
}


@pytest.mark.parametrize("attack", ROWS)
def test_a_row_that_is_none_is_refused_by_its_line(attack, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + ROWS[attack] + b"\n")
    refused(lambda: read(tmp_path / "a.jsonl"), "line 2 of", "a.jsonl")


def test_a_long_list_in_json_is_refused_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[" + b"{}," * 999_999 + b"{}]"))
    limits = Limits(max_expansion=10_000.0)
    monkeypatch.setattr(documents, "_LIST", 3_000_001)
    assert sum(1 for _ in documents.objects_of(tmp_path / "a.json.gz", "data.path", limits)) == 1_000_000
    monkeypatch.setattr(documents, "_LIST", 3_000_000)
    refused(lambda: list(documents.objects_of(tmp_path / "a.json.gz", "data.path", limits)), "a.json.gz", ".jsonl", megabytes=30)


def test_numbers_that_are_none_do_not_matter_beside_a_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "score": NaN, "id": ' + "9" * 10_000 + "}\n")
    assert read(tmp_path / "a.jsonl") == ["a"]


# ------------------------------------------------------------------------------------------------------------------- images


def images(path, labels=None):
    return ImageFiles(str(path), None, labels and str(labels), None, None, "train", None, ("image", "label"))


IDX = {
    "nothing": b"",
    "sizes of 2**96": struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1),
    "sizes whose product wraps": struct.pack(">4B3I", 0, 0, 14, 3, 2**31, 2**31, 4),
    "255 dimensions": struct.pack(">4B", 0, 0, 8, 255) + b"\0" * 1020,
    "none": struct.pack(">4B", 0, 0, 8, 0),
    "a cut header": struct.pack(">4BI", 0, 0, 8, 3, 1),
    "another type": struct.pack(">4B3I", 0, 0, 7, 3, 1, 1, 1) + b"\0",
}


@pytest.mark.parametrize("attack", IDX)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_an_idx_file_is_as_large_as_it_says(attack, pack, tmp_path):
    end = "" if pack is bytes else ".gz"
    (tmp_path / f"labels-idx1-ubyte{end}").write_bytes(pack(struct.pack(">4BI", 0, 0, 8, 1, 1) + b"\0"))
    (tmp_path / f"images-idx3-ubyte{end}").write_bytes(pack(IDX[attack]))
    refused(lambda: images(tmp_path / f"images-idx3-ubyte{end}"), "images-idx3-ubyte", megabytes=20)


def test_arrays_hold_numbers_and_nothing_that_runs(tmp_path):
    bomb = np.array([{"a": 1}], dtype=object)
    np.save(tmp_path / "x.npy", bomb, allow_pickle=True)
    np.save(tmp_path / "y.npy", np.zeros(1, np.int64))
    np.savez(tmp_path / "a.npz", x=bomb, y=np.zeros(1, np.int64), allow_pickle=True)
    (tmp_path / "b.npz").write_bytes(pickle.dumps(print))
    refused(lambda: images(tmp_path / "x.npy", tmp_path / "y.npy"), "x.npy", "without Python objects")
    refused(lambda: images(tmp_path / "a.npz"), "a.npz: x", "without Python objects")
    refused(lambda: images(tmp_path / "b.npz"), "b.npz")


def png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("raw", [png(10_000, 10_000), png(2**31 - 1, 2**31 - 1), png(90, 90), b"", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_a_picture_is_whole_and_no_bomb(raw, tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "one.png").write_bytes(raw)
    refused(lambda: images(tmp_path).images("train").read(0), "one.png", megabytes=20)


def test_a_picture_runs_no_program(tmp_path, monkeypatch):
    """Pillow calls Ghostscript for an EPS, whatever the file is called."""
    pytest.importorskip("PIL.Image", reason="Pillow reads the pictures")
    program, ran = tmp_path / "bin" / "gs", tmp_path / "ran"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "one.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    refused(lambda: images(tmp_path / "set").images("train").read(0), "one.png", "intact image")
    assert not ran.exists()


def test_a_row_of_pictures_names_no_file_elsewhere_and_no_host(tmp_path, monkeypatch):
    """The library would open what stands there, also in a column that nobody reads."""
    pytest.importorskip("PIL.Image", reason="Pillow reads the pictures")
    datasets = pytest.importorskip("datasets")
    elsewhere, cache = tmp_path / "own.png", tmp_path / "cache"
    elsewhere.write_bytes(png(2, 3))
    cache.mkdir()
    (cache / "known.png").write_bytes(png(2, 3))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    named = [str(elsewhere), "http://127.0.0.1:9/x.png", f"{cache}/../own.png", str(cache / "known.png")]
    rows = [{"bytes": None, "path": path} for path in named] + [{"bytes": png(2, 3), "path": "http://127.0.0.1:9/x.png"}]
    picture = datasets.Image()
    made = datasets.Dataset.from_dict(
        {"image": rows, "other": rows, "label": [0] * 5},
        features=datasets.Features({"image": picture, "other": picture, "label": datasets.Value("int64")}),
    )
    found = SetImages(made, ("image", "label"))
    assert found.labels.tolist() == [0] * 5
    for i in range(3):
        refused(lambda i=i: found.read(i), f"row {i} of the set must hold its picture, but names", "which is not in the set")
    assert found.read(3).shape == found.read(4).shape == (3, 2)


# -------------------------------------------------------------------------------------------------------------------- tokens


@pytest.fixture
def tokens(tmp_path):
    """A folder as `txtrain prepare` leaves it."""
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    for split in ("train", "validation"):
        np.arange(100, dtype="<u2").tofile(tmp_path / f"{split}-00000.bin")
        np.array([40, 100], dtype="<i8").tofile(tmp_path / f"{split}-00000.ends")
    shards = {split: [{"n_tokens": 100, "n_documents": 2}] for split in ("train", "validation")}
    about = {"format": "txtrain tokens 1", "key": "k", "dtype": "uint16", "tokenizer": tokenizer.fingerprint}
    (tmp_path / "index.json").write_text(json.dumps({**about, "shards": shards}))
    return tmp_path


def opened(folder):
    return TokenFiles(str(folder), None, None, "uint16", 0.1, 32)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "object"},
        {"dtype": "<u2,<u2"},
        {"dtype": 3},
        {"key": None},
        {"tokenizer": ["a"]},
        {"shards": []},
        {"shards": {}},
        {"shards": {"train": [], "validation": [3]}},
        {"shards": {"train": [{"n_tokens": "9", "n_documents": 1}], "validation": []}},
        {"shards": {"train": [{"n_tokens": 2**70, "n_documents": 1}], "validation": []}},
        {"shards": {"train": [{"n_tokens": -1, "n_documents": 1}], "validation": []}},
        {"format": {"a": 1}},
    ],
)
def test_an_index_of_tokens_is_what_prepare_writes(changes, tokens):
    opened(tokens)
    found = json.loads((tokens / "index.json").read_text())
    (tokens / "index.json").write_text(json.dumps({**found, **changes}))
    refused(lambda: opened(tokens), "index.json")


def test_numbers_of_rows_are_from_0_on(tokens):
    found = json.loads((tokens / "index.json").read_text())
    marked = {"format": "txtrain tokens 2", "pairs": False, "seq_len": 32}
    (tokens / "index.json").write_text(json.dumps({**found, **marked}))
    for split in ("train", "validation"):
        np.ones(100, dtype="u1").tofile(tokens / f"{split}-00000.trained")
        np.array([-1, 3] if split == "train" else [7, 2**40], dtype="<i8").tofile(tokens / f"{split}-00000.numbers")
    assert opened(tokens).tokens("validation")[0].numbers().tolist() == [7, 2**40]
    refused(lambda: opened(tokens).tokens("train")[0].numbers(), "train-00000.numbers", "from 0 on")


@pytest.mark.parametrize("ends", [[100, 40], [-1, 100], [40, 2**62], [40, 99]])
def test_documents_lie_one_behind_the_other(ends, tokens):
    np.array(ends, dtype="<i8").tofile(tokens / "train-00000.ends")
    refused(lambda: opened(tokens).tokens("train")[0].offsets, "train-00000.ends")


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"dtype": "object"}', b'{"dtype": {}}', b"[" * 100_000, b"\xff"])
def test_the_facts_of_a_cache_are_checked(raw, tmp_path):
    writer = TokenWriter(tmp_path, 300)
    with writer.open():
        writer.append("train", [1, 2, 3], ends=True)
    writer.finish()
    assert len(TokenFile(tmp_path, "train")) == 3
    (tmp_path / "meta.json").write_bytes(raw)
    refused(lambda: TokenFile(tmp_path, "train"), "meta.json")


def test_the_places_in_a_cache_are_checked(tmp_path):
    writer = TokenWriter(tmp_path, 300)
    with writer.open():
        writer.append("train", [1, 2, 3], ends=True)
    writer.finish()
    for made in (np.array([0, 9]), np.array([[0, 3]]), np.array([0.0, 3.0]), np.zeros(0, np.int64)):
        np.save(tmp_path / "train.offsets.npy", made)
        refused(lambda: TokenFile(tmp_path, "train").shards[0].offsets, str(tmp_path))


def megatron(folder, sequences, documents):
    lengths, places = np.full(sequences, 50, "<i4"), np.arange(sequences, dtype="<i8") * 100
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, sequences, len(documents))
    (folder / "a.idx").write_bytes(head + lengths.tobytes() + places.tobytes() + np.array(documents, "<i8").tobytes())
    np.arange(50 * sequences, dtype="<u2").tofile(folder / "a.bin")
    return TokenFiles(str(folder / "a.bin"), None, None, "uint16", 0.1, 32)


@pytest.mark.parametrize("documents", [[0, 9**9, 2], [0, -5, 2], [-(2**60), 1, 2]])
def test_documents_of_megatron_are_among_its_sequences(documents, tmp_path):
    assert megatron(tmp_path, 2, [0, 1, 2]).tokens("train")[0].offsets is not None
    refused(lambda: megatron(tmp_path, 2, documents), "a.idx")


# -------------------------------------------------------------------------------------------------------- sets of the library


def labels(path, **keys):
    wanted = {"text_column": "text", "text_pair_column": None, "label_column": "label", "kind": "single", "label_names": ()}
    limits = {"max_expansion": 200.0, "max_text_bytes": MB, "encoding_errors": "strict", "bad_rows": "refuse"}
    of_set = {"delimiter": None, "name": None, "split": "train", "val_split": None, "val_path": None}
    return LabelledTexts(str(path), **{**wanted, **limits, **of_set, **keys})


@pytest.mark.parametrize("name", ["pandas", "text", "webdataset"])
def test_a_loader_of_the_library_is_no_set(name, tmp_path, monkeypatch):
    """It would read the current folder: `pandas` its pickles."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.pkl").write_bytes(pickle.dumps([1]))
    for source in (lambda: HubDataset(name, None, "train", None, None, "text"), lambda: labels(name)):
        refused(source, "`data.path`", f"{name} is the name of a loader")


CARDS = {
    "a URL": "configs:\n- config_name: x\n  data_files: [{split: train, path: 'https://127.0.0.1:1/a.jsonl'}]",
    "a path": "configs:\n- config_name: x\n  data_files: /etc/passwd",
    "a path above": "configs:\n- {config_name: x, data_files: {train: ../secret.jsonl}}",
    "a folder": "configs:\n- {config_name: x, data_files: a.jsonl, data_dir: /etc}",
    "by an alias": "x: &x [/etc/passwd]\nconfigs:\n- {config_name: x, data_files: *x}",
    "no YAML": "configs: [",
    "no configs": "configs: 5",
}


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("card", CARDS)
def test_a_local_set_reads_files_of_its_folder_alone(card, name, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for file in (folder / "a.jsonl", tmp_path / "secret.jsonl"):
        file.write_text('{"text": "a"}\n')
    (folder / name).write_text(f"---\n{CARDS[card]}\n---\n# A set\n" if name == "README.md" else CARDS[card])
    refused(lambda: HubDataset(str(folder), None, "train", None, None, "text"), "`data.path`", "set")
    (folder / name).write_text(f"---\nhomepage: https://example.org/..\n{'configs: [{config_name: x, data_files: a.jsonl}]'}\n---\n")
    if name == "README.md":
        assert list(HubDataset(str(folder), None, "train", None, None, "text").documents("train")) == ["a"]


@pytest.mark.parametrize("raised", [RuntimeError("no scripts"), PermissionError(13, "denied"), ValueError(""), KeyError("x")])
def test_whatever_the_library_raises_is_an_error_of_the_key(raised, tmp_path, monkeypatch):
    import datasets

    def load(*args, **keys):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load)
    (tmp_path / "a.jsonl").write_text("{}")
    refused(lambda: HubDataset(str(tmp_path / "a.jsonl"), None, "train", None, None, "text"), "`data.path`", "a.jsonl")

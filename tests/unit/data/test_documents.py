"""Files with a text in each row, and packed ones: written by other code than reads them."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from txtrain.data.sources.files import find_files
from txtrain.data.sources.memmap import TokenFiles
from txtrain.data.sources.text import TextFiles
from txtrain.errors import ConfigError

TEXTS = ["first\nof two lines", "second Ünïcode", "third"]


def jsonl(column: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def write_parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def documents(*paths: Path, **keys: str) -> list[str]:
    return list(TextFiles(tuple(map(str, paths)), **keys).documents("train"))


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lambda raw: pa.compress(raw, codec="zstd", asbytes=True)], ids=["plain", "gz", "zst"])
def test_rows_and_texts_are_read_packed_and_unpacked(pack, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    end = "" if request.node.callspec.id == "plain" else f".{request.node.callspec.id}"
    rows, text = tmp_path / f"a.jsonl{end}", tmp_path / f"b.txt{end}"
    rows.write_bytes(pack(jsonl()))
    text.write_bytes(pack(b"all of\r\nit\n"))
    assert documents(rows, text) == [*TEXTS, "all of\nit\n"]


def test_several_frames_of_zstandard_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(pa.compress(jsonl()[:30], codec="zstd", asbytes=True) + pa.compress(jsonl()[30:], codec="zstd", asbytes=True))
    assert documents(path) == TEXTS


def test_parquet_gives_its_rows_and_leaves_out_null(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=[*TEXTS, None], n=[1, 2, 3, 4])
    assert documents(path) == TEXTS
    assert documents(write_parquet(tmp_path / "b.parquet", words=["x"]), text_column="words") == ["x"]


def test_a_folder_gives_all_kinds_and_globs_pick(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jsonl.gz").write_bytes(gzip.compress(jsonl()))
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "readme.md").write_text("no")
    write_parquet(tmp_path / "c.parquet", text=["c"])
    assert documents(tmp_path) == ["b", "c", *TEXTS]
    assert documents(tmp_path / "**" / "*.jsonl*") == TEXTS


def test_the_column_is_part_of_the_identity_of_rows_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "b.txt").write_text("b")
    rows, text = (lambda column: TextFiles(str(tmp_path / "a.jsonl"), None, column)), (lambda column: TextFiles(str(tmp_path / "b.txt"), None, column))
    assert rows("text").identity() != rows("id").identity()
    assert text("text").identity() == text("id").identity()


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    row = json.dumps({"text": "x" * 100_000}).encode() + b"\n"
    with gzip.open(path, "wb", compresslevel=1) as f:
        for _ in range(300):
            f.write(row)
    tracemalloc.start()
    n = sum(map(len, TextFiles(str(path)).documents("train")))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n == 30_000_000
    assert peak < 3_000_000, f"{peak / 1e6:.1f} MB for a file of 30 MB"


MISTAKES = [
    ("a.jsonl", b'{"text": "x"}\n{"text": ', r"line 2 of \S+a\.jsonl must be whole, valid JSON, but is not: Expecting value"),
    ("a.jsonl", b'["x"]\n', "line 1 of .* is a list"),
    ("a.jsonl", b'{"txt": "x", "n": 1}\n', r"`data\.text_column` must be one of txt, n for line 1 of .*, but is text instead\. Did you mean txt\?"),
    ("a.jsonl", b'{"text": 7}\n', r"must hold text, but text in line 1 of .* is 7\."),
    ("a.jsonl", b'{"text": "abc"}\n\xff', "byte 0xff at offset 16"),
    ("a.jsonl.gz", jsonl(), "must be a whole gzip file"),
    ("a.jsonl.gz", gzip.compress(jsonl())[:-4], "must be a whole gzip file"),
    ("a.txt.zst", b"no such thing", "must be a whole Zstandard file"),
    ("a.txt.zst", pa.compress(jsonl(), codec="zstd", asbytes=True)[:-3], "must be a whole Zstandard file"),
    ("a.parquet", b"PAR1", "must be a whole Parquet file"),
]


@pytest.mark.parametrize(("name", "raw", "says"), MISTAKES, ids=[f"{i} {name}" for i, (name, *_) in enumerate(MISTAKES)])  # gzip tells the time
def test_what_is_wrong_in_a_file_is_told_with_its_place(name: str, raw: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ConfigError, match=says) as e:
        documents(tmp_path / name)
    assert name in str(e.value)
    assert len(e.value.problems) == 1


def test_a_column_of_parquet_must_exist_and_hold_text(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", txt=["a"], n=[1])
    with pytest.raises(ConfigError, match=r"one of txt, n for .*Did you mean txt\?"):
        documents(path)
    with pytest.raises(ConfigError, match="holds int64"):
        documents(path, text_column="n")


# -------------------------------------------------------------------------------------------------- one path or several


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.txt", "c.txt", "a,b.txt", "p0.txt", "p1.txt", "x"):
        (tmp_path / name).write_text(f"This is {name}.\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("c.txt,a.txt", ["c.txt", "a.txt"]),
        ("[c.txt,a.txt]", ["c.txt", "a.txt"]),
        ("[c.txt, a.txt]", ["c.txt", "a.txt"]),
        ("""["c.txt", 'a.txt']""", ["c.txt", "a.txt"]),
        ("[c.txt]", ["c.txt"]),
        ("a,b.txt", ["a,b.txt"]),
        ("c.txt,p*.txt,", ["c.txt", "p0.txt", "p1.txt"]),
        ("p[0,1].txt", ["p0.txt", "p1.txt"]),
        ("[p[0,1].txt,a.txt]", ["p0.txt", "p1.txt", "a.txt"]),
        ("[wxyz]", ["x"]),
        (("a,b.txt", "a.txt"), ["a,b.txt", "a.txt"]),
    ],
)
def test_a_path_that_exists_as_typed_wins_and_others_are_lists(spec: str, names: list[str], here: Path) -> None:
    assert [file.name for file in find_files(spec, "data.path")] == names


def test_several_paths_are_the_list_of_a_file_in_order_and_identity(here: Path) -> None:
    one, two, other = (TextFiles(path) for path in ("c.txt,a.txt", ("c.txt", "a.txt"), "a.txt,c.txt"))
    assert [*one.documents("train")] == [*two.documents("train")] == ["This is c.txt.\n", "This is a.txt.\n"]
    assert one.identity() == two.identity() != other.identity()
    assert one.describe().startswith("c.txt,a.txt (2 files")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("a.txt,d.txt", "`data.path` must be an existing file, glob or folder, but d.txt does not exist."),
        ("[a.txt,cc.txt]", "but cc.txt does not exist. Did you mean c.txt?"),
        (",", "but , does not exist"),
        (("a.txt,c.txt",), "but a.txt,c.txt does not exist"),
    ],
)
def test_of_several_paths_the_one_that_does_not_exist_is_named(spec: str, says: str, here: Path) -> None:
    with pytest.raises(ConfigError) as e:
        find_files(spec, "data.path")
    assert says in str(e.value)


def test_several_files_of_tokens(here: Path) -> None:
    for name, n in (("t.bin", 3), ("u.bin", 5)):
        (here / name).write_bytes(bytes(2 * n))
    shards = TokenFiles("u.bin,t.bin", None, None, "uint16", 0.2, 32).shards["train"]
    assert [shard.path.name for shard in shards] == ["u.bin", "t.bin"]

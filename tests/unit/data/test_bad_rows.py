"""What is not UTF-8, and rows that are no text: refused with file, row and column, or treated as two keys say."""

import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from txtrain import compose
from txtrain.data.prepare import prepare
from txtrain.data.sources import hub
from txtrain.data.sources.documents import objects_of, rows_of_set
from txtrain.data.sources.files import Limits
from txtrain.data.sources.hub_text import hub_source
from txtrain.data.sources.source import build_source
from txtrain.data.sources.text import TextFiles
from txtrain.data.sources.translation import Translation
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.errors import ConfigError
from txtrain.objectives.base import build_objective
from txtrain.training.data_module import DataModule


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, Path]:
    """Three rows, the second of which is not UTF-8."""
    made = {name: tmp_path / f"a.{name}" for name in ("jsonl", "half.jsonl", "parquet", "tsv", "txt")}
    made["jsonl"].write_bytes(b'{"text": "one"}\n{"text": "t\xffwo"}\n{"text": "three"}\n')
    made["half.jsonl"].write_text('{"text": "one"}\n{"text": "t\\ud83dwo"}\n{"text": "three"}\n')
    raw = [b"one", b"t\xffwo", b"three"]
    column = pa.StringArray.from_buffers(3, pa.array(np.cumsum([0, *map(len, raw)]), pa.int32()).buffers()[1], pa.py_buffer(b"".join(raw)))
    pq.write_table(pa.table({"text": column}), made["parquet"])
    made["tsv"].write_bytes(b"one\t1\nt\xffwo\t2\nthree\t3\n")
    made["txt"].write_bytes(b"one\nt\xffwo\nthree\n")
    return made


def texts(path: Path, **keys) -> list[str]:
    if path.suffix == ".tsv":
        return [a for a, _ in Translation(str(path), None, None, None, None, "train", None, None, False, **keys).pairs("train")]
    return list(TextFiles(str(path), **keys).documents("train"))


PLACES = {
    "jsonl": "line 2 of PATH is not: byte 0xff at offset 27",
    "half.jsonl": "line 2 of PATH: `text` must be whole text",
    "parquet": "text in row 2 of PATH is not: byte 0xff at offset 1",
    "tsv": "line 2 of PATH is not: byte 0xff at offset 7",
    "txt": "PATH is not: byte 0xff at offset 5",
}


@pytest.mark.parametrize("kind", PLACES)
def test_what_is_not_utf_8_is_refused_replaced_or_left_out(kind: str, rows: dict[str, Path]) -> None:
    path = rows[kind]
    with pytest.raises(ConfigError) as e:
        texts(path)
    assert PLACES[kind].replace("PATH", str(path)) in str(e.value)
    found = texts(path, encoding_errors="replace")
    assert "".join(found).replace("\n", "") == "onet\ufffdwothree"
    if kind == "txt":  # no rows
        with pytest.raises(ConfigError):
            texts(path, bad_rows="skip")
    else:
        assert texts(path, bad_rows="skip") == ["one", "three"]


def objects(path: Path, errors: str = "strict", skipped: dict[str, str] | None = None, most: int = 1 << 20) -> list[tuple[str, dict]]:
    return list(objects_of(path, "data.path", Limits(max_text_bytes=most, encoding_errors=errors, skipped=skipped)))


def half_written(tmp_path: Path, rows: dict[str, Path], kind: str) -> Path:
    """Rows of a text, and of a list of texts in a mapping; neither is UTF-8 in the second."""
    path = rows[kind] if kind in rows else tmp_path / f"b.{kind}"
    if kind == "parquet":
        column = pq.read_table(path)["text"].combine_chunks()
        turns = pa.ListArray.from_arrays([0, 1, 2, 3], pa.StructArray.from_arrays([column], ["content"]))
        pq.write_table(pa.table({"text": column, "turns": turns, "word": column.dictionary_encode()}), path)
    else:
        half = {"text": "t\ud83dwo", "turns": [{"content": "t\ud83dwo"}]}
        made = [{"text": "one", "turns": []}, half, {"text": "three", "turns": []}]
        path.write_text(json.dumps(made) if kind == "json" else "".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.mark.parametrize("kind", ["parquet", "half.jsonl", "json"])
def test_whole_rows_are_refused_replaced_or_left_out(kind: str, tmp_path: Path, rows: dict[str, Path]) -> None:
    path = half_written(tmp_path, rows, kind)
    says = {"parquet": "text in row 2 of {} is not: byte 0xff at offset 1", "half.jsonl": "line 2 of {}: `text` must be whole", "json": "{}: `rows"}
    with pytest.raises(ConfigError, match=re.escape(says[kind].format(path))):
        objects(path)
    found = [row for _, row in objects(path, "replace")]
    assert [row["text"] for row in found] == ["one", "t\ufffdwo", "three"]
    assert found[1]["turns"] == [{"content": "t\ufffdwo"}]
    if kind != "json":  # which is read as one text
        skipped: dict[str, str] = {}
        word = "row" if kind == "parquet" else "line"
        assert [where for where, _ in objects(path, skipped=skipped)] == [f"{word} {i} of {path}" for i in (1, 3)]
        assert list(skipped) == [f"{word} 2 of {path}"]


def test_a_row_of_parquet_is_one_text(tmp_path: Path) -> None:
    path, skipped = tmp_path / "a.parquet", {}
    few = pa.array(["one", "two" * 900, "one"]).dictionary_encode()  # the dictionary is no row's
    pq.write_table(pa.table({"a": ["x", "y" * 5000, "z"], "b": [None, [{"c": "long" * 9}], None], "few": few}), path)
    assert [len(row["a"]) for _, row in objects(path)] == [1, 5000, 1]
    with pytest.raises(ConfigError, match=r"at most 1,000 bytes \(data\.max_text_bytes\), but that of row 2 of \S+a\.parquet is longer"):
        objects(path, most=1000)
    assert [row for _, row in objects(path, most=1000, skipped=skipped)] == [{"a": a, "b": None, "few": "one"} for a in "xz"]


def test_rows_of_a_set_hold_what_its_columns_of_json_say(tmp_path: Path) -> None:
    """As `datasets` gives them: calls of tools, whose arguments differ from row to row."""
    said = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": [1, "b"]}', None, "{"]))
    turns = pa.StructArray.from_arrays([pa.array(["a", "b", "c"]), said], ["content", "arguments"])
    pq.write_table(pa.table({"turns": pa.ListArray.from_arrays(pa.array([0, 2, 3], pa.int32()), turns)}), tmp_path / "a.parquet")
    rows, skipped = hub.load_dataset(str(tmp_path / "a.parquet"), None, "train"), {}
    ((where, row),) = rows_of_set(rows, "a/set", "data.path", Limits(skipped=skipped))
    assert (where, row["turns"]) == ("row 1 of a/set", rows[0]["turns"])
    assert [call["arguments"] for call in row["turns"]] == [{"a": [1, "b"]}, None]
    assert "turns.arguments in row 2 of a/set must be whole, valid JSON" in skipped["row 2 of a/set"]


@pytest.mark.parametrize("kind", ["labels", "translation"])
def test_rows_of_a_set_that_are_no_texts_have_the_same_treatment(kind: str, rows: dict[str, Path], make_config, monkeypatch) -> None:
    column = pq.read_table(rows["parquet"])["text"]
    pq.write_table(pa.table({"text": column, "label": ["a", "b", "a"]}), rows["parquet"])
    local = lambda path, name, split: hub.load_dataset(str(rows["parquet"]), name, split)  # noqa: E731
    monkeypatch.setattr("txtrain.data.sources.labels.load_dataset", local)

    def made(**keys):
        source = build_source(make_config(kind, {"path": "a/set" if kind == "labels" else str(rows["parquet"]), **keys}))
        return [(row.texts if kind == "labels" else row)[0] for row in getattr(source, "labelled" if kind == "labels" else "pairs")("train")]

    with pytest.raises(ConfigError, match=r"text in row 2 of .* is not: byte 0xff at offset 1"):
        made()
    assert made(encoding_errors="replace") == ["one", "t\ufffdwo", "three"]
    assert made(bad_rows="skip") == ["one", "three"]


def test_every_kind_of_bad_row_is_listed_with_its_cause(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = [b'{"text": 3}', b'{"other": "x"}', b'{"text": "cut', b"[]", b'{"text": "' + b"x" * 2000 + b'"}', b'{"text": "\xff"}', b"\0"]
    path.write_bytes(b"\n".join([b'{"text": "good"}', *bad, b'{"text": null}', b'{"text": "last"}']))
    source = TextFiles(str(path), max_text_bytes=500, bad_rows="skip")
    for _ in range(2):  # the tokenizer and the cache both read all
        assert list(source.documents("train")) == ["good", "last"]
    assert list(source.skipped) == [f"line {i} of {path}" for i in range(2, 9)]
    assert all(str(path) in why for why in source.skipped.values())


def test_rows_of_a_set_have_the_same_treatment(rows: dict[str, Path]) -> None:
    def made(errors: str, bad: str):
        return hub_source(str(rows["parquet"]), None, "train", None, None, "text", False, 0.05, 1 << 20, errors, bad)

    with pytest.raises(ConfigError, match=r"text in row 2 of .*a.parquet \(train\) is not"):
        list(made("strict", "refuse").documents("train"))
    assert list(made("replace", "refuse").documents("train")) == ["one", "t\ufffdwo", "three"]
    assert list(made("strict", "skip").documents("train")) == ["one", "three"]
    assert len({made(e, b).identity() for e in ("strict", "replace") for b in ("refuse", "skip")}) == 4


def test_what_is_left_out_is_in_the_fingerprint_and_listed_beside_the_tokens(make_config, tmp_path: Path, caplog) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"a text of number {i} " * 9}) + "\n" for i in range(60)))
    clean, lists = [], []
    for bad in (False, True):
        if bad:
            path.write_text(path.read_text() + "no row\n")
        for way in ("refuse", "skip")[bad:]:
            config = make_config("text", {"path": str(path), "bad_rows": way})
            caplog.clear()
            made = prepare(build_source(config), config, build_objective(config))
            clean.append(made.fingerprint)
            lists.append([line for file in made.skipped for line in file.read_text().splitlines()])
            assert made.n_skipped == bad == ("1 bad rows are left out" in caplog.text)
    assert len(set(clean)) == 3
    again = prepare(build_source(config), config, build_objective(config))  # from the cache
    assert again.n_skipped == 1
    assert lists[:2] == [[], []]
    assert [json.loads(line)["row"] for line in lists[2]] == [f"line 61 of {path}"]


def test_fingerprints_of_data_without_the_new_keys_are_what_they_were(make_config, corpus_file: Path) -> None:
    config = make_config("text", {"path": str(corpus_file)})
    assert prepare(build_source(config), config, build_objective(config)).fingerprint == "251fc89783286e1a"


def test_a_seed_has_64_bits() -> None:
    for seed in (2**70, 2**64, -(2**63) - 1):
        with pytest.raises(ConfigError, match="`seed` must be"):
            compose([f"seed={seed}"])
    assert compose([f"seed={2**64 - 1}"]).seed == 2**64 - 1


@pytest.fixture
def stream(tmp_path: Path, make_config):
    """The batches' module of a streamed set; bytes that are no UTF-8 in every third row."""
    raw = [b"row %d is%s here" % (i, b" \xff" if i % 3 == 2 else b"") for i in range(60)]
    column = pa.StringArray.from_buffers(60, pa.array(np.cumsum([0, *map(len, raw)]), pa.int32()).buffers()[1], pa.py_buffer(b"".join(raw)))
    pq.write_table(pa.table({"text": column}), tmp_path / "stream.parquet")

    def made(**keys: object) -> DataModule:
        path = str(tmp_path / "stream.parquet")
        given = {"path": path, "streaming": True, "val_fraction": 0.1, "stream_readers": 1, "shuffle_buffer": 0, **keys}
        module = DataModule(make_config("hf", given, trainer={"limit_val_batches": 1}))
        module.prepare()
        return module

    return made


def read_of(module: DataModule, n: int) -> str:
    rows = torch.cat([batch["input_ids"][:, :15].flatten() for batch in itertools.islice(module.train_dataloader(), n)])
    return bytes(i for i in rows.tolist() if i < 256).decode()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_lists_bad_rows_as_it_meets_them(stream, tmp_path: Path, workers: int) -> None:
    module = stream(bad_rows="skip", num_workers=workers)
    module.write_skipped(tmp_path)
    said = read_of(module, 8)
    assert "row 3 is here" in said
    assert "row 2 " not in said
    told = [json.loads(line) for line in (tmp_path / "skipped_rows.jsonl").read_text().splitlines()]
    met = [int(re.search(r"row (\d+) of", row["row"])[1]) for row in told]
    assert sorted(met) == sorted(set(met))
    assert set(met) <= set(range(3, 61, 3))
    assert 3 in met
    assert module.facts["skipped_rows"] == len(met) > 3
    (tmp_path / "skipped_rows.jsonl").open("a").write('{"row": "half')
    again = stream(bad_rows="skip", num_workers=workers, stream_readers=2, shuffle_buffer=9)
    again.write_skipped(tmp_path)
    read_of(again, 40)  # more than an epoch
    lines = (tmp_path / "skipped_rows.jsonl").read_text().splitlines()
    assert lines[: len(told)] == [json.dumps(row, ensure_ascii=False) for row in told]
    assert len(lines) == len(set(lines)) == again.facts["skipped_rows"] == 20


def test_a_stream_refuses_or_replaces_as_other_data(stream) -> None:
    with pytest.raises(ConfigError, match=r"text in row 3 of .*stream.parquet is not: byte 0xff"):
        read_of(stream(), 8)
    replaced = stream(encoding_errors="replace")
    assert "row 2 is \ufffd here" in read_of(replaced, 8)
    assert len({m.fingerprint for m in (replaced, stream(bad_rows="skip"), stream(bad_rows="skip", encoding_errors="replace"))}) == 3


def test_what_is_no_file_is_told_by_its_kind(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    kinds = {str(tmp_path / "pipe"): "is a pipe", "/dev/null": "is a device", str(tmp_path / "link"): "is a link to .*nothing, which does not exist"}
    for path, kind in kinds.items():
        for read in (TextFiles, load_tokenizer, lambda path: Translation(f"{path}", f"{path}", None, None, None, "train", None, None, False)):
            with pytest.raises(ConfigError, match=f"`data.* {kind}"):
                read(path)

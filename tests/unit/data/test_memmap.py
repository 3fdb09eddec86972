"""Token files of other tools, written here byte by byte as those tools write them."""

import itertools
import json
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from txtrain.config.schema import Train
from txtrain.data.samples.packed import PackedSamples
from txtrain.data.sources.memmap import TokenFiles
from txtrain.data.store.tokens import Shard, Tokens
from txtrain.data.tokenizer.tokenizer import byte_tokenizer
from txtrain.errors import ConfigError
from txtrain.run_config import Extent
from txtrain.training.data_module import DataModule

DOCUMENTS = [[7, 1, 2], [3, 4, 5, 6, 7], [1], [9, 9, 8, 2, 6, 5, 3]]
STREAM = [i for d in DOCUMENTS for i in d]


def write_megatron(prefix: Path, documents: list[list[int]], code: int = 8, sequences_per_document: int = 1) -> Path:
    """As Megatron-LM's IndexedDatasetBuilder: sequences, each of a document, in a .bin; the .idx tells where."""
    letter = {1: "B", 4: "i", 5: "q", 8: "H"}[code]
    width = struct.calcsize(letter)
    sequences, borders = [], [0]
    for document in documents:
        size = -(-len(document) // sequences_per_document)
        sequences += [document[i : i + size] for i in range(0, len(document), size)]
        borders.append(len(sequences))
    prefix.with_suffix(".bin").write_bytes(b"".join(struct.pack(f"<{len(s)}{letter}", *s) for s in sequences))
    places = [width * sum(map(len, sequences[:i])) for i in range(len(sequences))]
    raw = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code) + struct.pack("<QQ", len(sequences), len(borders))
    raw += b"".join(struct.pack("<i", len(s)) for s in sequences) + b"".join(struct.pack("<q", p) for p in places)
    prefix.with_suffix(".idx").write_bytes(raw + b"".join(struct.pack("<q", b) for b in borders))
    return prefix


def write_raw(path: Path, ids: list[int], letter: str = "H") -> Path:
    path.write_bytes(struct.pack(f"<{len(ids)}{letter}", *ids))
    return path


def write_own(folder: Path, shards: list[list[list[int]]], validation: list[list[int]], tokenizer=None) -> Path:
    folder.mkdir()
    tokenizer = tokenizer or byte_tokenizer()
    tokenizer.save(folder / "tokenizer")
    told = {"train": [], "validation": []}
    for split, parts in (("train", shards), ("validation", [validation])):
        for number, documents in enumerate(parts):
            write_raw(folder / f"{split}-{number:05d}.bin", [i for d in documents for i in d])
            ends = list(itertools.accumulate(map(len, documents)))
            (folder / f"{split}-{number:05d}.ends").write_bytes(struct.pack(f"<{len(ends)}q", *ends))
            told[split].append({"n_tokens": ends[-1] if ends else 0, "n_documents": len(ends)})
    index = {"format": "txtrain tokens 1", "key": "abc", "dtype": "uint16", "tokenizer": tokenizer.fingerprint, "shards": told}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def opened(path, val_path=None, tokenizer=None, dtype="uint16", val_fraction=0.25) -> TokenFiles:
    return TokenFiles(str(path), val_path, tokenizer, dtype, val_fraction, 32)


def whole(source: TokenFiles, eos_id=None) -> Tokens:
    """Training and validation one behind the other."""
    return Tokens([*source.tokens("train"), *source.tokens("validation")], "train", eos_id)


# ------------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("code", [1, 4, 5, 8])
@pytest.mark.parametrize("sequences", [1, 2])
def test_megatron_files_are_read_as_they_are(code: int, sequences: int, tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "corpus_text_document", DOCUMENTS, code, sequences)
    for path in (prefix, prefix.with_suffix(".bin"), prefix.with_suffix(".idx"), tmp_path):
        source = opened(path)
        assert whole(source).read(0, len(STREAM)).tolist() == STREAM
        (train,), (validation,) = source.tokens("train"), source.tokens("validation")
        assert (train.offsets.tolist(), validation.offsets.tolist()) == ([0, 3, 8, 9], [0, 7])


@pytest.mark.parametrize(("letter", "dtype"), [("B", "uint8"), ("H", "uint16"), ("I", "uint32"), ("q", "int64")])
@pytest.mark.parametrize("end", ["bin", "npy"])
def test_bare_files_of_nanogpt_and_olmo_are_read_as_they_are(letter: str, dtype: str, end: str, tmp_path: Path) -> None:
    source = opened(write_raw(tmp_path / f"part-0.{end}", STREAM, letter), dtype=dtype)
    assert whole(source).read(0, 16).tolist() == STREAM
    assert [s.n_tokens for s in (*source.tokens("train"), *source.tokens("validation"))] == [12, 4]


def test_a_true_npy_says_its_own_type(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array(STREAM, dtype=np.uint32))
    assert whole(opened(tmp_path / "a.npy")).read(0, 16).tolist() == STREAM


def test_nanogpts_folder_brings_its_validation(tmp_path: Path) -> None:
    write_raw(tmp_path / "train.bin", STREAM)
    write_raw(tmp_path / "val.bin", [4, 4])
    source = opened(tmp_path)
    assert [Tokens(source.tokens(split), split).read(0, n).tolist() for split, n in (("train", 16), ("validation", 2))] == [STREAM, [4, 4]]


def test_our_folder_has_documents_splits_and_a_tokenizer(tmp_path: Path) -> None:
    source = opened(write_own(tmp_path / "own", [DOCUMENTS[:2], DOCUMENTS[2:]], [[5, 5]]))
    train = Tokens(source.tokens("train"), "train")
    assert train.read(0, 16).tolist() == STREAM
    assert train.offsets.tolist() == [0, 3, 8, 9, 16]
    assert [train.document(i).tolist() for i in range(4)] == DOCUMENTS
    assert (source.key, source.tokenizer.vocab_size) == ("abc", 257)


def test_documents_of_bare_files_begin_behind_end_tokens_where_these_are_known(tmp_path: Path) -> None:
    shard = opened(write_raw(tmp_path / "a.bin", [1, 0, 2, 2, 0, 3, 0, 4])).shards["train"][0]
    two = [Shard(shard.path, shard.dtype, 8)] * 2
    tokens = Tokens(two, "train", eos_id=0)
    assert tokens.starts(np.array([0, 5]), 9).astype(int).tolist() == [[1, 0, 1, 0, 0, 1, 0, 1, 1], [1, 0, 1, 1, 0, 1, 0, 0, 1]]
    assert tokens.offsets.tolist() == [0, 2, 5, 7, 8, 10, 13, 15, 16]
    assert [t.tolist() for t in tokens.beginnings(5, 2)] == [[1, 0], [2, 2], [3, 0], [4], [1, 0]]
    assert Tokens(two, "train").starts(np.array([0]), 16)[0].nonzero()[0].tolist() == [0, 8]


# -------------------------------------------------------------------------------------------------------------------- stream


@settings(max_examples=80, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 60_000), min_size=1, max_size=9), min_size=1, max_size=20),
    cuts=st.sets(st.integers(1, 19), max_size=4),
    seq_len=st.integers(2, 14),
)
def test_samples_do_not_depend_on_how_the_stream_is_cut_into_files(tmp_path_factory, documents, cuts, seq_len) -> None:
    folder = tmp_path_factory.mktemp("own")
    borders = [0, *sorted(c for c in cuts if c < len(documents)), len(documents)]
    parts = [documents[a:b] for a, b in itertools.pairwise(borders)]
    one = Tokens(opened(write_own(folder / "one", [documents], [[1]])).tokens("train"), "train")
    many = Tokens(opened(write_own(folder / "many", parts, [[1]])).tokens("train"), "train")
    assert len(one) == len(many)
    a, b = PackedSamples(one, seq_len), PackedSamples(many, seq_len)
    assert len(a) == len(b)
    rows = np.arange(len(a))[::-1].copy()
    first, second = a.batch(rows), b.batch(rows)
    stream = [i for d in documents for i in d]
    assert first["input_ids"].tolist() == [stream[r * (seq_len - 1) :][:seq_len] for r in rows]
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert pickle.loads(pickle.dumps(many)).offsets.tolist() == one.offsets.tolist()


def test_held_out_ends_are_cut_between_documents_and_in_each_file(tmp_path: Path) -> None:
    documents = [[d] * 10 for d in range(10)]
    for name in "ab":
        write_megatron(tmp_path / name, documents)
    source = opened(tmp_path, val_fraction=0.17)
    assert [(s.path.name, s.n_tokens) for split in ("train", "validation") for s in source.tokens(split)] == [
        ("a.bin", 90),
        ("b.bin", 90),
        ("a.bin", 10),
        ("b.bin", 10),
    ]
    assert set(Tokens(source.tokens("validation"), "validation").read(0, 20).tolist()) == {9}


def test_a_file_larger_than_memory_costs_what_is_read(tmp_path: Path) -> None:
    """8 GB with holes, of which a process that may have 3 GB of data reads some windows."""
    path = tmp_path / "large.bin"
    with path.open("wb") as f:
        f.truncate(8 << 30)
    code = f"""
import resource, numpy as np
resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
from txtrain.data.sources.memmap import TokenFiles
from txtrain.data.store.tokens import Tokens
tokens = Tokens(TokenFiles({str(path)!r}, None, None, "uint16", 0.1, 32).tokens("train"), "train", eos_id=1)
tokens.probe()
assert tokens.windows(np.arange(0, len(tokens) - 2048, len(tokens) // 64), 2048).shape[1] == 2048
assert tokens.starts(np.array([len(tokens) - 2048]), 2048).sum() == 0
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")))  # pages of a file can always be given back
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout) * 1024
    assert peak < 1.5e9, f"{peak / 1e9:.2f} GB"


# ------------------------------------------------------------------------------------------------------------------ training


def test_a_run_reads_bare_tokens_without_a_tokenizer(make_config, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 500, 4000)
    ids.astype("<u2").tofile(tmp_path / "a.bin")
    module = DataModule(make_config("memmap", {"path": str(tmp_path / "a.bin"), "tokenizer": None}))
    (batch,) = itertools.islice(module.train_dataloader(), 1)
    rows = module.order.rows(batch["sample_index"].numpy())
    assert batch["input_ids"].tolist() == [ids[r * 15 :][:16].tolist() for r in rows]
    assert (module.tokenizer, module.token_bytes, module.prompts(2)) == (None, None, [])
    assert module.n_train == (3800 - 1) // 15
    assert not batch["document_ids"].any()


def test_workers_give_the_same_batches(make_config, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_own(tmp_path / "own", [[rng.integers(0, 256, n).tolist() for n in rng.integers(1, 60, 30)] for _ in range(3)], [[1] * 40])
    config = {"path": str(tmp_path / "own"), "tokenizer": None}
    plain, workers = (list(itertools.islice(DataModule(make_config("memmap", {**config, "num_workers": n})).train_dataloader(), 20)) for n in (0, 2))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(plain, workers, strict=True) for k in a)


@pytest.mark.parametrize("first", [True, False], ids=["all first", "splits first"])
def test_all_of_a_folder_and_its_splits_have_plans_of_their_own(make_config, monkeypatch, tmp_path: Path, first: bool) -> None:
    """Both in one cache, in either order."""
    write_own(tmp_path / "own", [[[1] * 20] * 30], [[2] * 20] * 5)
    config = make_config("memmap", {"path": str(tmp_path / "own"), "tokenizer": None, "packing": "none", "seq_len": 32})
    made = {}
    for whole in (first, not first):
        monkeypatch.setattr(Train, "extent", Extent(whole=whole))
        made[whole] = DataModule(config)
        made[whole].prepare()
    assert {whole: (data.n_train, data.n_val) for whole, data in made.items()} == {True: (35, 35), False: (30, 5)}
    assert made[True].fingerprint != made[False].fingerprint


def test_an_id_that_the_model_lacks_is_told_with_its_place(make_config, tmp_path: Path) -> None:
    ids = np.zeros(40_000, dtype="<u2")
    ids[20_123] = 600
    ids.tofile(tmp_path / "a.bin")
    with pytest.raises(ConfigError, match=r"ids from 0 to 511, but token 20123 of \S+a\.bin, read as <u2, is 600"):
        list(DataModule(make_config("memmap", {"path": str(tmp_path / "a.bin"), "tokenizer": None, "val_fraction": 0.01})).prepare() or ())


def mistake(tmp_path: Path, what: str) -> None:
    write_raw(tmp_path / "a.bin", STREAM)
    if what == "nothing there":
        opened(tmp_path / "b.bin")
    elif what == "packed":
        (tmp_path / "a.bin.gz").write_bytes(b"as many bytes as tokens")
        opened(tmp_path / "a.bin.gz", dtype="uint8")
    elif what == "odd size":
        (tmp_path / "a.bin").write_bytes(b"123")
        opened(tmp_path / "a.bin")
    elif what == "no index":
        (tmp_path / "a.idx").write_bytes(b"something else, but long enough for a header" * 2)
        opened(tmp_path / "a.bin")
    elif what == "cut index":
        write_megatron(tmp_path / "m", DOCUMENTS)
        (tmp_path / "m.idx").write_bytes((tmp_path / "m.idx").read_bytes()[:-1])
        opened(tmp_path / "m.bin")
    elif what == "other bin":
        write_megatron(tmp_path / "m", DOCUMENTS)
        write_raw(tmp_path / "m.bin", STREAM[:-1])
        opened(tmp_path / "m.bin")
    elif what == "two rows":
        np.save(tmp_path / "t.npy", np.zeros((2, 3), dtype=np.int32))
        opened(tmp_path / "t.npy")
    elif what == "same twice":
        opened(tmp_path / "a.bin", str(tmp_path / "a.bin"))
    elif what == "cut shard":
        write_raw(write_own(tmp_path / "own", [DOCUMENTS], [[1]]) / "train-00000.bin", STREAM[:-1])
        opened(tmp_path / "own")
    elif what == "other tokenizer":
        write_own(tmp_path / "own", [DOCUMENTS], [[1]], byte_tokenizer().with_specials(["[MASK]"]))
        opened(tmp_path / "own", tokenizer="bytes")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("nothing there", r"`data\.path` must be an existing file, glob or folder.*Did you mean \S+a\.bin\?"),
        ("packed", r"`data\.path` must be files of tokens as they are, .*but \S+a\.bin\.gz is packed \(\.gz\)"),
        ("odd size", r"must hold tokens of 2 bytes \(data\.dtype=uint16\), but has 3 bytes"),
        ("no index", "must begin as an index of Megatron does"),
        ("cut index", r"must have \d+ bytes for its 4 sequences, but has \d+: it is cut off"),
        ("other bin", "they do not belong together"),
        ("two rows", r"one row of integers, but \S+ holds int32 of shape \[2, 3\]"),
        ("same twice", r"`data\.val_path` must not overlap data\.path"),
        ("cut shard", r"train-00000\.bin must have 32 bytes, but has 30\. Prepare again"),
        ("other tokenizer", r"`data\.tokenizer` must be the one of \S+own, but is bytes instead"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(what: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as e:
        mistake(tmp_path, what)
    assert re.search(says, str(e.value)), str(e.value)


def test_an_objective_with_tokens_of_its_own_needs_a_tokenizer(make_config, tmp_path: Path) -> None:
    import dataclasses as dc

    from txtrain.objectives.config import MaskedLMConfig

    write_raw(tmp_path / "a.bin", STREAM * 40)
    config = make_config("memmap", {"path": str(tmp_path / "a.bin"), "tokenizer": None})
    objective = MaskedLMConfig(type="masked_lm", next_sentence=False)
    encoder = dc.replace(config.model, topology="encoder")
    with pytest.raises(ConfigError, match=r"`data\.tokenizer` must be given"):
        DataModule(dc.replace(config, model=encoder, objective=objective)).prepare()

import gzip
import itertools
import json

import numpy as np
import pytest

from txtrain.data.samples.pairs import PairCorpus
from txtrain.data.sources.source import build_source
from txtrain.errors import ConfigError
from txtrain.training.data_module import DataModule

PAIRS = [(f"the {i}th source", f"die {i}. Quelle ist länger") for i in range(300)]


def batches(module: DataModule, n: int):
    return list(itertools.islice(module.train_dataloader(), n))


def decoded(module: DataModule, row) -> str:
    return module.tokenizer.decode([i for i in row.tolist() if i >= 0])


@pytest.fixture
def tsv(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{a}\t{b}\n" for a, b in PAIRS))
    return path


@pytest.fixture
def config(make_config, tsv):
    return lambda **data: make_config("translation", {"path": str(tsv), "seq_len": 64, "val_fraction": 0.2, **data})


def test_a_pair_is_source_and_target_with_their_ends(config):
    module = DataModule(config())
    seen = set()
    module.prepare()
    for batch in batches(module, module.n_train // 4):
        for source, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            read, written = source[mask != 0], labels[labels != -100]
            assert read[-1] == written[-1] == module.tokenizer.eos_id
            assert (source[mask == 0] == module.tokenizer.eos_id).all()
            seen.add((decoded(module, read), decoded(module, written)))
        assert batch["input_ids"].shape[1] % 8 == batch["labels"].shape[1] % 8 == 0
    assert seen <= set(PAIRS)
    assert len(seen) == module.n_train // 4 * 4
    assert module.n_train + module.n_val == 300
    assert 30 < module.n_val < 90


@pytest.mark.parametrize("kind", ["3 columns", "gz", "aligned", "aligned gz", "columns", "swap", "jsonl"])
def test_every_layout_gives_the_same_pairs(kind, config, tmp_path):
    rows, path, keys = PAIRS, str(tmp_path / "other.tsv"), {}
    if kind == "3 columns":
        (tmp_path / "other.tsv").write_text("".join(f"ref {i}\t{a}\t{b}\n" for i, (a, b) in enumerate(rows)))
    elif kind == "gz":
        path += ".gz"
        (tmp_path / "other.tsv.gz").write_bytes(gzip.compress("".join(f"{a}\t{b}\n" for a, b in rows).encode()))
    elif kind == "columns":
        (tmp_path / "other.tsv").write_text("".join(f"{b}\t{a}\tby somebody\tx\n" for a, b in rows))
        keys["columns"] = (1, 0)
    elif kind == "swap":
        (tmp_path / "other.tsv").write_text("".join(f"{b}\t{a}\n" for a, b in rows))
        keys["swap"] = True
    elif kind == "jsonl":
        path = str(tmp_path / "other.jsonl")
        (tmp_path / "other.jsonl").write_text("".join(json.dumps({"translation": {"en": a, "de": b}}) + "\n" for a, b in rows))
    else:
        end = ".gz" if "gz" in kind else ""
        for side, name in enumerate(("en", "de")):
            raw = "".join(f"{pair[side]}\n" for pair in rows).encode()
            (tmp_path / f"t.{name}{end}").write_bytes(gzip.compress(raw) if end else raw)
        path, keys["target_path"] = str(tmp_path / f"t.en{end}"), str(tmp_path / f"t.de{end}")
    assert list(build_source(config(path=path, **keys)).pairs("train")) == rows


def test_lines_end_at_newlines_alone(config, tmp_path):
    """At equal numbers of other signs the rest would be shifted in silence."""
    ends = "\x0b\x0c\x1c\x85\u2028\u2029\r"
    rows = [("a", "A"), *((f"b{end}c", f"B {i}") for i, end in enumerate(ends)), ("", ""), ("d", "D" + ends)]
    paths = []
    for side, end in ((0, "\n"), (1, "\r\n")):
        paths.append(tmp_path / f"t{side}")
        paths[-1].write_bytes(end.join(pair[side] for pair in rows).encode() + end.encode() * side)
    source = build_source(config(path=str(paths[0]), target_path=str(paths[1])))
    assert list(source.pairs("train")) == rows
    assert source.identity().endswith(" lines"), "an older cache holds other rows"


def test_both_splits_may_hold_other_ends_of_lines(config, tmp_path):
    names = {}
    for split in ("", "val_"):
        for side, key in (("source", "path"), ("target", "target_path")):
            file = tmp_path / f"{split}{side}"
            file.write_text(f"{split}{side} one\u2028\n{split}{side} two\x0c\n")
            names[split + key] = str(file)
    source = build_source(config(**names))
    assert list(source.pairs("validation")) == [("val_source one\u2028", "val_target one\u2028"), ("val_source two\x0c", "val_target two\x0c")]
    assert [word for word in source.identity().split() if word == "lines"] == ["lines"] * 2


def test_equal_sources_are_on_one_side_of_the_split():
    class Twice:
        def pairs(self, split):
            return ((f"{i % 50}", f"answer {i}") for i in range(500))

    sides: dict[str, set[str]] = {}
    for split, (source, _) in PairCorpus(Twice(), 0.3).rows():
        sides.setdefault(source, set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    assert len({next(iter(side)) for side in sides.values()}) == 2


def test_a_tokenizer_is_trained_on_both_sides(config):
    module = DataModule(config(tokenizer="train"))
    module.prepare()
    vocab = module.tokenizer.backend.get_vocab()
    assert {"Ġsource", "ĠQuelle"} <= set(vocab)


def test_longer_pairs_are_left_out_and_told(config, caplog):
    module = DataModule(config(seq_len=22))
    with pytest.raises(ConfigError, match=r"must have at least one training pair of at most data\.seq_len=22"):
        module.prepare()
    module = DataModule(config(seq_len=27))
    module.prepare()
    assert 0 < module.n_train < 100
    assert "longer than data.seq_len=27 and left out" in caplog.text


def test_mistakes_are_told_with_their_place(config, tmp_path):
    one, two = tmp_path / "a.en", tmp_path / "a.de"
    one.write_text("x\ny\n")
    two.write_text("x\n")
    with pytest.raises(ConfigError, match=r"a\.en has 2 and .*a\.de has 1"):
        build_source(config(path=str(one), target_path=str(two)))
    bad = tmp_path / "bad.tsv"
    bad.write_text("a\tb\nalone\n")
    with pytest.raises(ConfigError, match=r"line 2 of .*bad.tsv has 1"):
        list(build_source(config(path=str(bad))).pairs("train"))
    for wanted, needed in (((-3, -1), 3), ((0, -4), 4), ((0, 2), 3)):
        with pytest.raises(ConfigError, match=rf"must have at least {needed} columns in each line, but line 1 of .*pairs\.tsv has 2"):
            list(build_source(config(columns=wanted)).pairs("train"))
    cut = tmp_path / "cut.tsv.gz"
    cut.write_bytes(gzip.compress(b"a\tb\n" * 100)[:-9])
    with pytest.raises(ConfigError, match="whole gzip file"):
        list(build_source(config(path=str(cut))).pairs("train"))
    with pytest.raises(ConfigError, match=r"`data\.val_path` must not overlap data\.path, but both name .*bad\.tsv"):
        build_source(config(path=str(bad), val_path=str(bad)))


def test_reverse_is_reversed_and_never_validated_on_training_strings(make_config):
    module = DataModule(make_config("reverse", {"seq_len": 24, "n_pairs": 2000, "val_fraction": 0.1, "min_length": 1, "max_length": 8, "symbols": "digits"}))
    module.prepare()
    sides = []
    for rows in (module._train, module._val):
        batch = rows.batch(np.arange(len(rows)), None)
        pairs = [(decoded(module, s[m != 0]), decoded(module, t)) for s, m, t in zip(*batch.values(), strict=True)]
        assert all(target == source[::-1] for source, target in pairs)
        sides.append({source for source, _ in pairs})
    assert {len(source) for source in sides[0]} == set(range(1, 9))
    assert not sides[0] & sides[1]
    assert len(sides[1]) > 50

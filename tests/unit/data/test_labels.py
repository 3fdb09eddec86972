"""data=labels: files and columns, classes and numbers, special tokens, and the mistakes of tired people."""

import csv
import gzip
import json
from pathlib import Path

import pytest
import torch

from tests.training import RUN
from txtrain import compose
from txtrain.cli.main import main
from txtrain.data.tokenizer.tokenizer import byte_tokenizer
from txtrain.errors import ConfigError
from txtrain.training.data_module import DataModule

COLUMNS = ("text", "other", "label", "score", "funny", "scary")
ROWS = [
    (f"Text {i}, with \"quotes\"\nand a line end" if i % 5 == 0 else f"Text {i} of {'many ' * (i % 4)}words", f"beside {i}", ("no", "yes", "perhaps")[i % 3],
     i / 4, i % 2, int(i % 3 == 0))
    for i in range(60)
]


def table(path: Path, rows=ROWS, delimiter=",", columns=COLUMNS) -> Path:
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "wt", newline="", encoding="utf-8") as f:
        csv.writer(f, delimiter=delimiter).writerows([columns, *rows])
    return path


def lines(path: Path, rows=ROWS, columns=COLUMNS) -> Path:
    path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    return path


def data(path: Path, *overrides: str, model: str = "bert") -> DataModule:
    cache = f"data.cache_dir={path.parent / 'cache'}"
    shape = ("model.vocab_size=300", "model.max_seq_len=64", "data.seq_len=64", "data.tokenizer=bytes")
    made = DataModule(compose([f"model={model}", "data=labels", f"data.path={path}", *shape, *RUN, cache, *overrides]))
    made.prepare()
    return made


def texts(module: DataModule) -> dict[str, torch.Tensor]:
    """Every training text as it is read -> its label."""
    found = {}
    for batch, _ in module.first(None):
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            found[module.tokenizer.decode(ids[mask != 0].tolist(), special=True)] = label
    return found


def test_data_alone_choose_objective_head_and_its_classes(tmp_path):
    module = data(table(tmp_path / "a.csv"))
    config = module.config
    assert (config.objective.type, config.model.head.type, config.model.head.n_classes) == ("classification", "class", 3)
    assert config.model.head.label_names == ("no", "perhaps", "yes")
    assert module.n_train + module.n_val == len(ROWS)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.jsonl", "semicolons.txt"])
def test_every_format_gives_the_same_rows(name, tmp_path):
    path = tmp_path / name
    more = ()
    if name.endswith(".jsonl"):
        lines(path)
    else:
        delimiter = "\t" if ".tsv" in name else ";" if name.endswith(".txt") else ","
        table(path, delimiter=delimiter)
        more = ("data.delimiter=;",) if name.endswith(".txt") else ()
    module = data(path, "data.val_fraction=0.01", *more)
    names, found = module.config.model.head.label_names, texts(module)
    by_text = {f"[CLS]{text}[SEP]": label for text, _, label, *_ in ROWS}
    assert len(found) >= len(ROWS) - 4
    assert all(names[int(label)] == by_text[text] for text, label in found.items())


def test_pairs_several_classes_and_numbers(tmp_path):
    path = table(tmp_path / "a.csv")
    pairs = texts(data(path, "data.text_pair_column=other", "data.kind=multi", "data.label_column=[funny,scary]"))
    expected = {f"[CLS]{text}[SEP]{other}[SEP]": (funny, scary) for text, other, _, _, funny, scary in ROWS}
    assert pairs
    assert all(tuple(label.tolist()) == expected[text] for text, label in pairs.items())
    numbers = texts(data(path, "data.kind=regression", "data.label_column=score", model="gpt2"))
    expected = {f"<|endoftext|>{text}": score for text, _, _, score, *_ in ROWS}
    assert numbers
    assert all(label.item() == expected[text] for text, label in numbers.items())
    listed = tmp_path / "lists.jsonl"
    listed.write_text("".join(json.dumps({"text": f"Text {i}", "label": ["a", "b"][: i % 3]}) + "\n" for i in range(40)))
    module = data(listed, "data.kind=multi")
    assert module.config.model.head.label_names == ("a", "b")
    assert {tuple(label.tolist()) for label in texts(module).values()} == {(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)}


def test_segments_and_special_tokens_are_those_of_each_kind_of_model(tmp_path):
    path = table(tmp_path / "a.csv", [("ab", "c", f"k{i % 2}", 0, 0, 0) for i in range(30)] + [("x", "y", "k1", 0, 0, 0)])
    batch = next(data(path, "data.text_pair_column=other", "data.val_fraction=0.5").first(1))[0]
    n = int(batch["attention_mask"][0].sum())
    assert batch["token_type_ids"][0, :n].tolist() in ([0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1])
    backend = byte_tokenizer()
    frame = backend.framed("encoder_decoder").frame(2)
    assert frame.specials == ((), (256,), (256,))
    assert backend.framed("decoder").frame(1).specials == ((256,), ())
    assert backend.framed("decoder").pad_id == 256
    assert backend.framed("encoder_decoder").pad_id is None


def test_long_texts_are_cut_as_transformers_does(tmp_path):
    from transformers import PreTrainedTokenizerFast

    path = table(tmp_path / "a.csv", [("a" * (3 * i % 60), "b" * (60 - i), f"k{i % 2}", 0, 0, 0) for i in range(1, 50)])
    module = data(path, "data.text_pair_column=other", "data.seq_len=20", "data.val_fraction=0.2", "data.bad_rows=skip")
    theirs = PreTrainedTokenizerFast(tokenizer_object=module.tokenizer.backend, pad_token="<|endoftext|>")
    wanted = {tuple(theirs(a, b, truncation=True, max_length=20)["input_ids"]) for a, b, *_ in csv.reader(path.open()) if a != "text" and a}
    found = set()
    for batch, _ in module.first(None):
        assert batch["input_ids"].shape[1] <= 20
        found |= {tuple(ids[mask != 0].tolist()) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)}
    assert found <= wanted
    assert len(found) > 3  # most rows are cut to the same halves


def test_a_class_of_more_digits_than_python_reads_is_a_name(tmp_path):
    long = "7" * 5000
    path = table(tmp_path / "a.csv", [(f"text {i}", "", ("10", "9", long)[i % 3], 0, 0, 0) for i in range(30)])
    assert data(path).config.model.head.label_names == ("9", "10", long)
    with pytest.raises(ConfigError, match=r"must hold one of the classes 9, 10 .* in line \d+ of .* is '777") as e:
        data(path, "data.label_names=['9','10']")
    assert len(str(e.value)) < 500


def test_a_table_that_is_none(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\nfür,a\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"must be text in UTF-8, but from line \d of .*a\.csv on it is not: byte 0xfc.*encoding_errors=replace"):
        data(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(b"text,label\nx\0y,a\n")
    with pytest.raises(ConfigError, match=r"line 2 of .*b\.csv holds a byte 0x00"):
        data(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text('text,label\n"never closed,a\nb,c\n')
    with pytest.raises(ConfigError, match=r"must be a table, but line 2 of .*c\.csv cannot be read"):
        data(tmp_path / "c.csv")


@pytest.mark.parametrize(
    ("rows", "overrides", "says"),
    [
        (ROWS, ("data.text_column=texts",), r"`data\.text_column` must be a column of .*a\.csv \(text, other, .*but is texts instead\. Did you mean text\?"),
        (ROWS, ("data.label_column=lable",), r"`data\.label_column` must be a column of .*Did you mean label\?"),
        ([*ROWS, ("", "b", "yes", 0, 0, 0)], (), r"`data\.text_column`: text in line \d+ of .*a\.csv must hold something, but is empty\. data\.bad_rows=skip"),
        (ROWS, ("data.label_column=score",), r"`data\.label_column` must hold classes, .*but score in line \d+ of .* is '0\.0'\. For numbers: data\.kind=regression"),
        (ROWS, ("data.kind=regression",), r"must hold numbers with data\.kind=regression, but label in line \d+ of .* is 'no'"),
        (ROWS, ("data.kind=multi", "data.label_column=[funny,label]"), r"must hold 0 and 1 in its columns .*but label in line \d+ of .* is 'no'"),
        (ROWS, ("data.kind=multi",), r"must be a list of columns of 0 and 1, or the name of a column of lists"),
        (ROWS, ("data.label_column=[funny,scary]",), r"must be one column with data\.kind=single.*data\.kind=multi"),
        (ROWS, ("data.label_names=[yes,no]",), r"must hold one of the classes yes, no \(of the .*\), but label in line \d+ of .* is 'perhaps'"),
        (ROWS, ("model.head.n_classes=5",), r"`model\.head\.n_classes` must be null or 3, the classes of data=labels: no, perhaps, yes, but is 5 instead\. Nearest: 3"),
        ([], (), r"a\.csv must hold rows, but has none below its line of column names"),
        ([*ROWS, ("one cell",)], (), r"must have 6 cells in each row, as in its first line, but line \d+ of .* has 1"),
        ([(f"t {i}", "", "yes", 0, 0, 0) for i in range(9)], (), r"must hold at least two classes, but all rows have 'yes'"),
        (ROWS, ("data.seq_len=2",), r"`data\.seq_len` must be at least 3, a token beside 2 special ones"),
        (ROWS, ("objective.label_smoothing=0.1", "data.kind=regression", "data.label_column=score"), r"label_smoothing` must be 0 with data\.kind=regression"),
    ],
)
def test_mistakes_are_told_by_file_row_and_column(rows, overrides, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        data(table(tmp_path / "a.csv", rows), *overrides)


def test_an_empty_file_and_a_validation_class_that_training_lacks(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ConfigError, match="the file is empty"):
        data(tmp_path / "empty.csv")
    other = table(tmp_path / "val.csv", [("a text", "", "maybe", 0, 0, 0)])
    with pytest.raises(ConfigError, match=r"one of the classes no, perhaps, yes \(of the .*\), but label in line 2 of .*val\.csv is 'maybe'"):
        data(table(tmp_path / "a.csv"), f"data.val_path={other}")


def test_bad_rows_are_skipped_and_listed_if_that_is_asked(tmp_path):
    module = data(table(tmp_path / "a.csv", [*ROWS, ("", "", "yes", 0, 0, 0), ("a text", "", "", 0, 0, 0)]), "data.bad_rows=skip")
    assert module.n_train + module.n_val == len(ROWS)
    assert module.n_skipped == 2
    assert set(module.config.model.head.label_names) == {"no", "perhaps", "yes"}


def test_preview_shows_texts_with_their_labels(tmp_path, capsys):
    path = table(tmp_path / "a.csv")
    run = ["preview", "model=bert", "data=labels", f"data.path={path}", "data.tokenizer=bytes", f"data.cache_dir={tmp_path / 'cache'}", "data.global_batch_size=8"]
    assert main([*run, "preview.n=2"]) == 0
    said = capsys.readouterr().out
    assert "label no" in said or "label yes" in said or "label perhaps" in said
    assert main([*run, "preview.n=2", "preview.format=json", "data.kind=multi", "data.label_column=[funny,scary]"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2
    assert all(row["label"] in ("none", "funny", "scary", "funny, scary") for row in rows)


def test_plan_counts_the_classes_of_the_data(tmp_path, capsys):
    path = table(tmp_path / "a.csv")
    assert main(["plan", "model=bert", "data=labels", f"data.path={path}", "plan.format=json"]) == 0
    dim = 128
    assert json.loads(capsys.readouterr().out)["params_by_part"]["head"] == dim * dim + dim + 3 * (dim + 1)

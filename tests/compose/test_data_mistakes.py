"""Mistakes that only the data can show: exit code 2, one message, nothing written."""

import socket

import pytest

from tests.training import write_text
from txtrain.cli.main import main

MISTAKES = [
    ("data=text data.path=/nowhere", "`data.path` must be an existing file, glob or folder, but /nowhere does not exist."),
    ("data=text data.path=good.tx", "Did you mean good.txt?"),
    ("data=wikitext data.path=/nowhere", "`data.path` must be"),
    ("data=text data.path=empty.txt", "`data.path`: empty.txt must hold text, but the file is empty."),
    ("data=text data.path=blank.txt", "`data` must have training text, but has none"),
    ("data=text data.path=nul.txt", "is a binary file: byte 0x00 at offset 3."),
    ("data=text data.path=latin.txt", "must be text in UTF-8"),
    ("data=text data.path=folder", "the folder folder must hold .txt, .jsonl or .parquet files with text, but holds none."),
    ("data=text data.path=*.md", "`data.path` must match files with text, but '*.md' matches none."),
    ("data=text data.path=short.txt data.tokenizer=bytes", "`data.seq_len` must be at most"),
    ("data=text data.path=good.txt data.tokenizer=bytes data.seq_len=5000 model=llama2 data.val_fraction=0.01", "of the validation text"),
    ("data=text data.path=good.txt data.val_path=good.txt", "`data.val_path` must"),
    ("data=text data.path=good.txt data.val_path=nope.txt", "`data.val_path` must be an existing file"),
    ("data=text data.path=good.txt data.tokenizer=bytes model.vocab_size=100", "`model.vocab_size` must be at least 257, the tokens of data.tokenizer=bytes"),
    ("data=text data.path=good.txt data.tokenizer=tokenizer.json", "`data.tokenizer`"),
    ("data=text data.path=good.txt data.tokenizer=folder", "`data.tokenizer`"),
    ("data=text data.path=good.txt data.tokenizer=no/such-tokenizer", "`data.tokenizer`"),
    ("data=text data.path=good.txt data.tokenizer=train model.vocab_size=100", "`model.vocab_size` must be at least"),
    ("data=text data.path=good.txt data.tokenizer=bytes trainer.accelerator=gpu", "`trainer.accelerator` must"),
    ("data=text data.path=good.txt data.tokenizer=bytes trainer.max_steps=null trainer.max_time=0:0:0:1", "`scheduler` must be constant"),
    ("data=text data.path=good.txt data.tokenizer=bytes run_dir=good.txt", "`run_dir` must"),
    ("data=text data.path=good.txt data.tokenizer=bytes run_dir=good.txt/a", "`run_dir` must"),
    ("data=text data.path=good.txt data.tokenizer=bytes logger.csv={_target_:lightning.pytorch.loggers.CSVLogger,nope:1}", "cannot be made"),
    ("data=text data.path=good.txt data.tokenizer=bytes logger.csv={_target_:lightning.pytorch.loggers.CSVLogger,flush_logs_every_n_steps:1,x:1} run_dir=a/b", "cannot be made"),  # noqa: E501
    ("data=hf data.path=folder", "`data"),
    ("data=hf data.path=no/such-set", "`data"),
    ("data=wikitext data.offline_fallback=never", "`data.offline_fallback` is never."),
    ("data=wikitext model=gpt2_small", "A stand-in is for laptop sizes only, not for small."),
]


@pytest.fixture
def places(clean_room, monkeypatch):
    """Files with something wrong, and no network."""
    write_text(clean_room / "good.txt")
    (clean_room / "empty.txt").touch()
    (clean_room / "blank.txt").write_text("\n \n")
    (clean_room / "nul.txt").write_bytes(b"abc\0def")
    (clean_room / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (clean_room / "short.txt").write_text("A line.\n")
    (clean_room / "tokenizer.json").write_text("{")
    (clean_room / "folder").mkdir()
    monkeypatch.setenv("HF_HOME", str(clean_room / ".cache"))
    monkeypatch.setattr(socket, "getaddrinfo", _no_network)
    return clean_room


def _no_network(*_, **__):
    raise socket.gaierror(-2, "Name or service not known")


@pytest.mark.parametrize(("line", "says"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_in_the_data_is_told_in_one_message_and_leaves_nothing(line, says, places, capsys):
    before = sorted(places.rglob("[!.]*"))
    assert main(["trainer.max_steps=2", *line.split()]) == 2
    out, err = capsys.readouterr()
    assert says in err
    told = [line for line in err.splitlines() if not line.startswith("tokenised ")]
    assert len(told) == 1, err
    assert told[0].startswith("txtrain: ")
    assert "Traceback" not in out + err
    assert [p for p in sorted(places.rglob("[!.]*")) if ".cache" not in p.parts] == before


def test_a_sweep_whose_jobs_have_no_data_leaves_nothing(places, capfd):
    assert main(["-m", "seed=1,2", "data=text", "data.path=empty.txt"]) == 1
    assert capfd.readouterr().err.count("the file is empty") == 2
    assert not (places / "runs").exists()

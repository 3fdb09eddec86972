"""Mistakes that only the data can show: exit code 2, one message, nothing written."""

import json
import socket

import numpy as np
import pytest

from tests.training import RUN, TINY, write_text
from txtrain.cli.main import main
from txtrain.data.samples import rows
from txtrain.data.store import tokens

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
    ("data=text data.path=good.txt data.tokenizer=bytes logger.csv={_target_:lightning.pytorch.loggers.CSVLogger,flush_logs_every_n_steps:1,x:1} run_dir=a/b", "cannot be made"),
    ("data=hf data.path=folder", "`data"),
    ("data=hf data.path=no/such-set", "`data"),
    ("data=wikitext data.offline_fallback=never", "`data.offline_fallback` is never."),
    ("data=wikitext model=gpt2_small", "The fallback is for laptop sizes only, not for small."),
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


@pytest.mark.slow
def test_a_sweep_whose_jobs_have_no_data_leaves_nothing(places, capfd):
    assert main(["-m", "seed=1,2", "data=text", "data.path=empty.txt"]) == 1
    assert capfd.readouterr().err.count("the file is empty") == 2
    assert not (places / "runs").exists()


# ------------------------------------------------------------------------- found before the folder is made, or in a run

IDS = [*TINY, "data=memmap", "data.path=ids.bin", "run_dir=run"]
MINE = [*TINY, "imports=[mine.py]", "data=mine", "run_dir=run"]
OWN_SAMPLES = """
import txtrain

@txtrain.component("data", "mine")
class Mine:
    def samples(self, split):
        found = [{"input_ids": [i % 7] * 32} for i in range(400)]
        CHANGE
        return found
"""


def refused(line, capsys) -> str:
    """The one line of a mistake that is found before anything is written."""
    assert main(line) == 2
    (told,) = capsys.readouterr().err.splitlines()
    return told


def failed(line, capsys, folder) -> str:
    """The one line of a mistake that only the run found."""
    assert main(line) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (told,) = [line for line in err.splitlines() if line.startswith("txtrain: ")]
    assert json.loads((folder / "run/run.json").read_text())["status"] == "failed"
    return told


def write_ids(folder, wrong: slice) -> None:
    ids = np.zeros(60_000, dtype="<u2")
    ids[wrong] = 300
    ids.tofile(folder / "ids.bin")


def test_an_id_that_the_model_lacks_is_found_before_the_folder_is_made(clean_room, capsys):
    write_ids(clean_room, slice(20_123, 20_124))
    told = refused(IDS, capsys)
    assert f"from 0 to 256, but token 20123 of {clean_room / 'ids.bin'}, read as <u2, is 300" in told
    assert not (clean_room / "run").exists()


@pytest.mark.parametrize("n_workers", [0, 1])
def test_an_id_that_only_a_run_finds_makes_it_fail_with_file_and_place(n_workers, clean_room, capsys, monkeypatch):
    monkeypatch.setattr(tokens, "HASHED_BELOW", 1000)
    write_ids(clean_room, slice(5000, 20_000))  # between what is looked at beforehand
    told = failed([*IDS, f"data.num_workers={n_workers}"], capsys, clean_room)
    place = int(told.partition("but token ")[2].split()[0])
    assert 5000 <= place < 20_000
    assert f"token {place} of {clean_room / 'ids.bin'}, read as <u2, is 300" in told


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("found[57]['input_ids'].pop()", "one shape in all samples, but has [32] in sample 1 and [31] in"),
        ("found[57]['labels'] = [1] * 32", "must have the keys of sample 1 (input_ids) in all samples"),
        ("found[57]['input_ids'][3] = 300", "from 0 to 256, but sample 57 has 300 at [3]"),
    ],
    ids=["shape", "keys", "ids"],
)
def test_a_sample_unlike_the_others_is_told_with_its_number(change, says, clean_room, forget, capsys, monkeypatch):
    """Before the folder is made where it is among those that are read then; else in the run, which fails."""
    (clean_room / "mine.py").write_text(OWN_SAMPLES.replace("CHANGE", change))
    monkeypatch.setattr(rows, "PROBED", 400)
    told = refused(MINE, capsys)
    assert says in told
    assert "`samples('train')`" in told
    assert "sample 57 has" in told or told.endswith("in sample 57.")
    assert not (clean_room / "run").exists()
    monkeypatch.setattr(rows, "PROBED", 2)
    assert failed([*MINE, "trainer.max_steps=60", "trainer.val_check_interval=99"], capsys, clean_room) == told


VIT = ("model=vit", "model.n_layers=1", "model.dim=32", "model.n_heads=2", "data.mean=[0.5]", "data.std=[0.5]", *RUN)
PICTURES = """
import numpy as np
import txtrain
from txtrain.data.images_config import PixelConfig

class Pictures:
    labels = np.zeros(200, dtype=np.int64)

    def read(self, i):
        return np.zeros((28, 28, 4 if i == 57 else 1), dtype=np.uint8)

@txtrain.component("data", "pictures")
class Mine:
    Config = PixelConfig

    def images(self, split):
        return Pictures()
"""


def test_an_image_of_other_channels_is_told_with_its_number(clean_room, forget, capsys, monkeypatch):
    (clean_room / "mine.py").write_text(PICTURES)
    line = [*VIT, "imports=[mine.py]", "data=pictures", "run_dir=run"]
    monkeypatch.setattr(rows, "PROBED", 400)
    told = refused(line, capsys)
    assert "the channels of image 57, but is" in told
    assert not (clean_room / "run").exists()
    monkeypatch.setattr(rows, "PROBED", 2)
    assert failed([*line, "trainer.max_steps=60", "trainer.val_check_interval=99"], capsys, clean_room) == told


def test_a_fork_of_another_model_is_refused_before_anything_is_written(clean_room, capsys):
    write_text(clean_room / "text.txt")
    line = [*TINY, "data.path=text.txt"]
    assert main([*line, "run_dir=parent"]) == 0
    capsys.readouterr()
    told = refused([*line, "fork=parent", "resume_allow=[model]", "model.dim=48", "run_dir=run"], capsys)
    assert "is of another model" in told
    assert not (clean_room / "run").exists()

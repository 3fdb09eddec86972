"""`txtrain prepare`: what is written, what trains on it, and what a kill leaves."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.training import RUN, rows, write_chats, write_preferences, write_text
from txtrain.cli.main import main
from txtrain.data.prepare_rows import _LARGE
from txtrain.data.store.shard_writer import ShardWriter
from txtrain.data.store.tokenize import Limit
from txtrain.errors import ConfigError
from txtrain.ground import files

MODEL = ("model=llama2", "model.n_layers=1", "model.dim=32", "model.n_heads=2", "model.vocab_size=300", "model.max_seq_len=32", *RUN)


def write_documents(path: Path, n: int) -> Path:
    rng = np.random.default_rng(0)
    with path.open("w") as f:
        for i in range(n):
            f.write(json.dumps({"text": f"Document {i}: " + " ".join(f"{w:x}" for w in rng.integers(0, 1 << 20, int(rng.integers(1, 200))))}) + "\n")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def certain(folder: Path) -> int:
    """Documents of which a restart would go on."""
    return json.loads((folder / "state.json").read_text())["n_documents"] if (folder / "state.json").exists() else 0


def prepare(text: Path, out: Path, *more: str) -> int:
    return main(["prepare", *MODEL, "data=text", f"data.path={text}", "data.tokenizer=train", f"out={out}", *more])


@pytest.mark.parametrize("objective", [(), ("model=bert", "objective.next_sentence=false")], ids=["causal_lm", "masked_lm"])
def test_a_run_on_the_prepared_folder_is_the_run_on_the_text(objective, tmp_path, capsys):
    text = write_documents(tmp_path / "a.jsonl", 300)
    text.write_text(text.read_text() + "no row\n")
    shape = [*MODEL, *objective, "model.norm_position=pre"] if objective else [*MODEL]
    given = ["data=text", f"data.path={text}", "data.tokenizer=train", "data.bad_rows=skip"]
    assert main(["prepare", *shape, *given, "out=ready", "prepare.shard_tokens=9000"]) == 0
    assert len(list(Path("ready").glob("train-*.bin"))) > 2
    assert main([*shape, *given, "run_dir=direct"]) == 0
    assert main([*shape, "data=memmap", "data.path=ready", "run_dir=mapped"]) == 0
    one, two = (json.loads(Path(run, "run.json").read_text()) for run in ("direct", "mapped"))
    assert one["data_order_hash"] == two["data_order_hash"]
    assert one["data"]["fingerprint"] == two["data"]["fingerprint"]
    assert rows(Path("direct")) == rows(Path("mapped"))
    for run, told in (("direct", one), ("mapped", two)):
        assert told["data"]["skipped_rows"] == 1
        assert json.loads(Path(run, "skipped_rows.jsonl").read_text())["row"] == f"line 301 of {text}"


@pytest.mark.parametrize(("write", "objective"), [(write_chats, "sft"), (write_preferences, "dpo")], ids=["chats", "preferences"])
def test_a_run_on_prepared_conversations_is_the_run_on_their_files(write, objective, tmp_path, capsys):
    given = [*write(tmp_path / "rows"), f"objective={objective}", "trainer.max_steps=5"]
    assert main(["prepare", *MODEL, *given, "out=ready", "prepare.shard_tokens=700"]) == 0
    said = capsys.readouterr().out
    assert f"data=memmap data.path=ready data.packing=best_fit data.seq_len=32 objective={objective}" in said
    assert len(list(Path("ready").glob("train-*.trained"))) > 2
    ready = [f"objective={objective}", "trainer.max_steps=5", "data=memmap", "data.path=ready"]
    assert main([*MODEL, *given, "run_dir=direct"]) == 0
    assert main([*MODEL, *ready, "data.packing=best_fit", "run_dir=mapped"]) == 0
    one, two = (json.loads(Path(run, "run.json").read_text()) for run in ("direct", "mapped"))
    assert one["data_order_hash"] == two["data_order_hash"]
    assert one["data"]["fingerprint"] == two["data"]["fingerprint"]
    assert rows(Path("direct")) == rows(Path("mapped"))
    capsys.readouterr()
    assert main([*MODEL, *ready, "data.packing=best_fit", "data.seq_len=16", "run_dir=a"]) == 2
    assert "`data.seq_len` must be at least 32" in capsys.readouterr().err
    other = {"sft": "dpo", "dpo": "sft"}[objective]
    assert main([*MODEL, *ready, f"objective={other}", "data.packing=best_fit", "run_dir=a"]) == 2
    assert "which data.path holds, but is" in capsys.readouterr().err
    assert not Path("a").exists()


def test_a_complete_folder_is_left_as_it_is_and_another_text_is_refused(tmp_path, capsys):
    text = write_text(tmp_path / "a.txt")
    assert prepare(text, tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    assert not [name for name in before if "state" in name or name.endswith(".tmp")]
    assert prepare(text, tmp_path / "out") == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before
    text.write_text(text.read_text() + "more\n")
    assert prepare(text, tmp_path / "out") == 2
    assert "holds other text" in capsys.readouterr().err


def test_a_folder_that_another_process_prepares_is_refused_and_what_a_dead_one_left_is_not_in_the_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    text, out = write_text(tmp_path / "a.txt"), tmp_path / "out"
    out.mkdir()
    with files.locked(out):
        assert prepare(text, out) == 2
        assert "that no process writes to" in capsys.readouterr().err
        assert out.exists()
    assert prepare(text, out) == 0
    assert {".lock", "index.json"} < set(contents(out))


@pytest.mark.slow
@pytest.mark.parametrize("n_kills", [1, 20])
def test_killed_at_any_moment_and_started_again_the_result_is_the_same(n_kills, tmp_path):
    """kill -9 after random times, over and over, until it ends by itself; then byte by byte."""
    text = write_documents(tmp_path / "a.jsonl", 10_000)
    args = [*MODEL, "data=text", f"data.path={text}", "data.tokenizer=bytes", "prepare.shard_tokens=700000"]
    code = (  # small steps, so that there is something to go on from; what is written does not depend on them
        "import sys; from txtrain.data.store import shard_writer, tokenize; shard_writer._EVERY = 0.02; tokenize._BATCH = 1 << 17; "
        "from txtrain.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )

    def start(out: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, "prepare", *args, f"out={out}"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    assert main(["prepare", *args, "out=whole"]) == 0
    drawn, kills, went_on = random.Random(0), 0, 0
    while True:
        before, process = certain(Path("killed")), start("killed")
        while kills < n_kills and process.poll() is None and certain(Path("killed")) <= before:
            time.sleep(0.002)
        try:
            process.wait(drawn.uniform(0, 0.1) if kills < n_kills else 120)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        said = process.communicate()[1]
        went_on += "goes on after" in said
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, said
    assert went_on > 0, f"{kills} kills, and {went_on} starts that had something to go on from"
    one, two = contents(Path("whole")), contents(Path("killed"))
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_after_a_disk_was_full_a_second_try_goes_on(tmp_path, monkeypatch, capsys):
    text = write_text(tmp_path / "a.txt")
    args = ["prepare", *MODEL, "data=text", f"data.path={text}", "data.tokenizer=bytes"]
    real = ShardWriter.append

    def full(self, split, ids, ends):
        if split == "validation":
            raise OSError(28, "No space left on device")
        real(self, split, ids, ends)

    with monkeypatch.context() as m:
        m.setattr(ShardWriter, "append", full)
        assert main([*args, "out=out"]) == 2
    assert "`out` must be a folder, or a new one in a folder, that can be written to, but is 'out' instead: No space" in capsys.readouterr().err
    assert main([*args, "out=out"]) == main([*args, "out=whole"]) == 0
    assert contents(Path("out")) == contents(Path("whole"))


@pytest.mark.parametrize("harm", [lambda file: file.write_bytes(file.read_bytes()[:-1]), Path.unlink], ids=["cut", "gone"])
@pytest.mark.parametrize("name", ["train-00000.bin", "validation-00000.ends"])
def test_an_unfinished_folder_with_less_than_was_written_is_not_filled_with_zeros(harm, name, tmp_path):
    writer = ShardWriter(tmp_path, "key", 300, 1000)
    for split in ("train", "validation"):
        writer.append(split, [1, 2, 3], ends=True)
    writer.save(now=True)
    writer.append("train", [4], ends=True)  # not certain
    writer.close()
    ShardWriter(tmp_path, "key", 300, 1000).close()
    harm(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"`out`: \S+{name} must have at least \d bytes, but (has \d|is missing)\. Remove \S+, and prepare again"):
        ShardWriter(tmp_path, "key", 300, 1000)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "`out` must be given"),
        ("out=full", "must be a new or empty folder, but 'full' is not empty"),
        ("out=text.txt", "text.txt is a file"),
        ("out=text.txt/new", "text.txt is a file"),
        ("out=new prepare.shard_tokens=0", "`prepare.shard_tokens` must be at least 1"),
        ("out=new data.path=blank.txt", "must have training text, but has none"),
        ("out=new data.path=nope.txt", "`data.path` must be an existing file"),
        ("out=new data.path=bad.jsonl", "line 301 of"),
        ("out=new prepare.shard_token=3", "Did you mean prepare.shard_tokens?"),
    ],
)
def test_a_mistake_leaves_nothing(line, says, tmp_path, capsys):
    write_text(tmp_path / "text.txt")
    (tmp_path / "blank.txt").write_text(" \n")
    write_documents(tmp_path / "bad.jsonl", 300)
    with (tmp_path / "bad.jsonl").open("a") as f:
        f.write("{\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["prepare", *MODEL, "data=text", "data.path=text.txt", "data.tokenizer=bytes", *line.split()]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_is_no_text_is_refused(capsys):
    assert main(["prepare", "model=transformer", "objective=seq2seq", "data=reverse", "out=new"]) == 2
    assert "`data` must be a source of text to be tokenised, but is reverse" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- many nodes


class _Trainer:
    num_nodes = 2


def test_a_run_on_several_nodes_does_not_tokenise_much_and_names_prepare(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from txtrain.data import prepare_rows as prepared
    from txtrain.data.sources.text import TextFiles
    from txtrain.data.store.split import Corpus
    from txtrain.data.store.tokenize import tokenise
    from txtrain.data.tokenizer.tokenizer import byte_tokenizer

    assert _LARGE == 1_000_000_000
    assert prepared.limit_of(SimpleNamespace(trainer=SimpleNamespace(num_nodes=1))) is None
    limit = prepared.limit_of(SimpleNamespace(trainer=_Trainer()))
    assert limit == Limit(_LARGE, "trainer.num_nodes=2")
    large = write_documents(tmp_path / "a.jsonl", 3000)  # of unknown size before it is read
    corpus = Corpus(TextFiles(str(large)), 0.1)
    with pytest.raises(ConfigError, match=r"trainer\.num_nodes=2.*txtrain prepare data"):
        tokenise(corpus, byte_tokenizer(), tmp_path, limit=limit._replace(n_bytes=100_000))
    text = write_text(tmp_path / "a.txt")
    monkeypatch.setattr("txtrain.data.store.tokenize._encode", lambda *_: pytest.fail("read although the size was known"))
    with pytest.raises(ConfigError, match="txtrain prepare"):
        tokenise(Corpus(TextFiles(str(text)), 0.1), byte_tokenizer(), tmp_path, limit=limit._replace(n_bytes=1000))

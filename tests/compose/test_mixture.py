"""A run on several sources: what its folder says, and that a stop changes nothing."""

from pathlib import Path

import pytest

from tests.training import RUN, TINY, weights, write_text
from txtrain.cli.main import main
from txtrain.monitor.metrics_csv import read

SHAPE = [line for line in TINY if not line.startswith(("data=", "data.val_fraction"))]
MIXED = (*SHAPE, "data=mixture", "data.sources.a={type:text,path:a.txt,val_fraction:0.2}", "data.sources.b.type=text", "data.sources.b.path=b.txt")


@pytest.fixture(autouse=True)
def texts(tmp_path):
    write_text(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("".join(f"{i} is less than {i + 1}.\n" for i in range(500)))
    assert RUN[0] in SHAPE


def test_tokens_epochs_and_losses_of_each_source_are_in_the_metrics_and_survive_a_stop(tmp_path):
    line = [*MIXED, "data.weights={a:0.75,b:0.25}", "scheduler=constant", "trainer.max_steps=12"]
    assert main([*line, "run_dir=whole"]) == 0
    assert main([*line, "trainer.max_steps=7", "run_dir=parts"]) == 0
    assert main([*line, "run_dir=parts"]) == 0
    names = ("step", "loss", "val_loss", "val_loss/a", "val_loss/b", "tokens/a", "tokens/b", "epochs/a", "epochs/b")
    whole, parts = ([{n: row[n] for n in names} for row in read(Path(run) / "metrics.csv") if row["step"] != "7"] for run in ("whole", "parts"))
    assert whole == parts
    assert weights(Path("whole")) == weights(Path("parts"))
    last = {n: float(v) for n, v in whole[-1].items()}
    assert last["tokens/a"] + last["tokens/b"] == 12 * 8 * 32
    assert min(last["val_loss/a"], last["val_loss/b"]) < last["val_loss"] < max(last["val_loss/a"], last["val_loss/b"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.sources.b.typ=x"], "`data.sources.b.typ=x`: data.sources.b has no key typ."),
        (["data.sources.b.type=nope"], "`data.sources.b.type` must be one of"),
        (["data.sources.b.type=reverse", "~data.sources.b.path"], "`data.sources.b.type` must be a source of text, but is reverse instead."),
        (["data.sources.c=text"], "`data.sources.c` must be a mapping, but is 'text' instead: write data.sources.c={type: "),
        (["data.weights={a:1,b:-1}"], "`data.weights.b` must be above 0, but is -1.0 instead."),
        (["data.sources.b.path=none.txt"], "`data.sources.b.path` must be an existing file, glob or folder, but none.txt does not exist."),
        (["data.sources.b.tokenizer=bytes"], "`data.sources.b.tokenizer` must not be given: it is one for all sources. Write data.tokenizer=bytes."),
    ],
)
def test_a_mistake_in_a_source_names_it(words, says, capsys):
    assert main([*MIXED, *words]) == 2
    assert says in capsys.readouterr().err
    assert not Path("runs").exists()

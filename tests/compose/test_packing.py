"""data.packing=best_fit: what it trains, and what it does not go with."""

import pytest

from tests.training import TINY, write_text
from txtrain.cli.main import main


@pytest.mark.parametrize("more", [(), ("model=bert", "objective.next_sentence=false"), ("objective=prefix_lm",)], ids=["causal", "masked", "prefix"])
def test_a_run_on_best_fit_rows_learns(more, tmp_path, capsys):
    write_text(tmp_path / "a.txt")
    shape = [*TINY, "data.path=a.txt", "data.packing=best_fit", "trainer.max_steps=3", *more]
    if more[:1] == ("model=bert",):
        shape = [line for line in shape if line != "model.vocab_size=257"] + ["model.vocab_size=260"]
    assert main([*shape, "run_dir=run"]) == 0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("model=t5", "`data.packing` must be concat with objective=span_corruption, but is best_fit instead"),
        ("model=bert", "`data.packing` must be concat for pairs of segments"),
        ("model=transformer objective=seq2seq data=reverse", "`data.packing` must be concat with data=reverse"),
    ],
)
def test_what_cannot_be_padded_is_refused(line, says, capsys):
    assert main([*line.split(), *([] if "data=" in line else ["data=python_docs"]), "data.packing=best_fit"]) == 2
    assert says in capsys.readouterr().err

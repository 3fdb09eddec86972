"""What resumes into what: a checkpoint of every strategy and number of processes is continued under every other."""

import json
import os
import shutil

import pytest

from tests.distributed import resume_table
from tests.distributed.group import Case, train
from tests.distributed.resume_table import EXACT, LAYOUTS
from tests.distributed.runs import largest_differences, overrides, tensors
from tests.training import rows
from txtrain.checkpoint.format import path_of

SAVED, LAST = 2, 4
ALLOWED = 1e-5  # relative, of every loss after the checkpoint, in float32: the order of summation
MODEL = "tied decoder with softcaps and windows"
SHAPE = (
    "model.dim=40",  # 3 divides no size, 4 neither the vocabulary nor the hidden size of an FFN: shards of unlike sizes, and empty ones
    "model.vocab_size=362",
    "model.ffn.hidden_dim=50",
    "data.global_batch_size=12",
    f"trainer.max_steps={LAST}",
    f"trainer.val_check_interval={SAVED + 1}",
    f"save.every_n_steps={SAVED}",
    "save.keep_last=9",
    "save.keep_best=0",  # no checkpoint between the two
)


def of_size(n):
    return {name: strategy for name, (strategy, size) in LAYOUTS.items() if size == n}


class Resumed:
    """Every layout's uninterrupted run, with a checkpoint in the middle."""

    def __init__(self, folder):
        self.folder = folder
        for n in sorted({n for _, n in LAYOUTS.values()}):
            self.train(n, {name: Case(self.overrides(name, strategy, n)) for name, strategy in of_size(n).items()})

    def overrides(self, name, strategy, n):
        return overrides(self.folder, MODEL, name, *SHAPE, f"strategy={strategy}", f"trainer.devices={n}")

    def train(self, n, cases):
        train(cases, n, self.folder / f"group-{os.urandom(4).hex()}", timeout=1800)

    def into(self, n):
        """Every checkpoint into every layout of n processes: a cell each, and what is wrong."""
        pairs = [(a, b) for a in LAYOUTS for b in of_size(n)]
        cases = {}
        for a, b in pairs:
            shutil.copytree(self.folder / a, self.folder / f"{a}, {b}")
            shutil.rmtree(path_of(self.folder / f"{a}, {b}", LAST))
            cases[f"{a}, {b}"] = Case(self.overrides(f"{a}, {b}", LAYOUTS[b][0], n), [f"COPY {self.folder / f'read {a}, {b}'}"])
        self.train(n, cases)
        return {pair: self.cell(*pair) for pair in pairs}

    def cell(self, a, b):
        """`exact`: losses, validation, norms, weights and optimizer are bit for bit those of the run that was not stopped."""
        whole, resumed = self.folder / a, self.folder / f"{a}, {b}"
        assert same(tensors(path_of(whole, SAVED)), tensors(self.folder / f"read {a}, {b}")), f"{a} into {b}: what is read is not what was written"
        order = {json.loads((run / "run.json").read_text())["data_order_hash"] for run in (whole, resumed)}
        assert len(order) == 1, f"{a} into {b}: other samples"
        if parts_of_a_batch(a) == parts_of_a_batch(b):  # each process computes the same from the same weights: nothing has been summed otherwise yet
            first, again = (rows(run)[SAVED]["loss"] for run in (whole, resumed))
            assert first == again, f"{a} into {b}: the first loss is {again}, was {first}"
        if rows(whole) == rows(resumed) and same(tensors(whole), tensors(resumed)):
            return EXACT
        difference = max(largest_differences(whole, resumed, ("loss", "val_loss")).values())
        assert difference < ALLOWED, f"{a} into {b}: {difference:.1e}, allowed {ALLOWED:.0e}"
        return f"{difference:.0e}"


def parts_of_a_batch(name):
    """Into how many, and how many processes compute each of them."""
    strategy, n = LAYOUTS[name]
    lanes = {"tp": n, "fsdp_tp": 2}.get(strategy, 1)
    return n // lanes, lanes


def same(one, other):
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    return Resumed(tmp_path_factory.mktemp("table"))


@pytest.mark.slow
@pytest.mark.parametrize("n", sorted({n for _, n in LAYOUTS.values()}))
def test_every_checkpoint_is_continued_by_every_layout_of_n_processes(resumed, n):
    cells = resumed.into(n)
    for name in of_size(n):
        assert cells[name, name] == EXACT, f"{name} is not its own uninterrupted run: {cells[name, name]}"
    if os.environ.get("TXTRAIN_WRITE_DOCS") == "1":
        resume_table.write(cells)


@pytest.mark.slow
def test_a_page_without_a_cell_gets_its_first(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n| {resume_table.CORNER} |\n\nafter\n")
    assert resume_table.read(page) == {}
    a, b, *_ = LAYOUTS
    for found in ({(a, b): "1e-07"}, {(b, b): EXACT}):
        resume_table.write(found, page)
    assert resume_table.read(page) == {(a, b): "1e-07", (b, b): EXACT}
    assert (page.read_text().split("\n\n")[0], page.read_text().split("\n\n")[-1]) == ("before", "after\n")


def test_the_table_on_the_page_has_no_empty_cell():
    cells = resume_table.read()
    assert cells.keys() == {(a, b) for a in LAYOUTS for b in LAYOUTS}
    assert all(cells[name, name] == EXACT for name in LAYOUTS)
    assert max((float(cell) for cell in cells.values() if cell != EXACT), default=0) < ALLOWED

"""Rows of whole documents: every token once, none cut that fits, padding that nobody reads."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.test_packing import write
from txtrain.data.samples.best_fit import BestFitSamples, best_fit_decreasing, write_plan
from txtrain.training.data_module import DataModule


def packed(folder: Path, lengths: list[int], seq_len: int, across: bool = False):
    ids = itertools.count()
    documents = [[next(ids) for _ in range(n)] for n in lengths]
    tokens = write(folder / "tokens", documents)
    (folder / "plan").mkdir()
    write_plan(tokens, seq_len, folder / "plan")
    samples = BestFitSamples(tokens, seq_len, folder / "plan", pad_id=999, cross_document_attention=across)
    return documents, samples.batch(np.arange(len(samples)))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 14), min_size=1, max_size=40), seq_len=st.integers(2, 9))
def test_every_token_is_in_one_row_and_no_document_is_cut_that_fits(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int) -> None:
    documents, batch = packed(tmp_path_factory.mktemp("fit"), lengths, seq_len)
    real = batch["attention_mask"] == 1
    assert sorted(batch["input_ids"][real].tolist()) == list(range(sum(lengths)))
    assert (batch["input_ids"][~real] == 999).all()
    pieces = set()
    for ids, numbers, mask in zip(batch["input_ids"].tolist(), batch["document_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
        for _, group in itertools.groupby((i for i in zip(ids, numbers, mask, strict=True) if i[2]), key=lambda i: i[1]):
            pieces.add(tuple(i[0] for i in group))
        assert not {n for n, m in zip(numbers, mask, strict=True) if m} & {n for n, m in zip(numbers, mask, strict=True) if not m}, "padding in a document"
    assert pieces == {tuple(d[i : i + seq_len]) for d in documents for i in range(0, len(d), seq_len)}
    targets = batch["labels"][batch["labels"] != -100].tolist()
    assert sorted(targets) == sorted(i for piece in pieces for i in piece[1:])


def test_the_tightest_row_is_taken(tmp_path: Path) -> None:
    rows = list(best_fit_decreasing(np.array([6, 5, 4, 3, 2]), 8))
    assert rows == [[0, 4], [1, 3], [2]]


def test_best_fit_wastes_little(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).geometric(0.01, 20_000).clip(max=512)
    rows = list(best_fit_decreasing(lengths, 512))
    filled = lengths.sum() / (len(rows) * 512)
    assert filled > 0.99, f"{filled:.4f} of the positions are tokens"


def test_without_borders_documents_are_targets_from_the_first_token_on(tmp_path: Path) -> None:
    _, batch = packed(tmp_path, [2, 2, 3], 4, across=True)
    assert "document_ids" not in batch
    assert torch.equal(batch["labels"] != -100, batch["attention_mask"] == 1)


def test_the_plan_is_made_once_and_the_order_is_arithmetic(make_config, corpus_file: Path, monkeypatch) -> None:
    data = {"path": str(corpus_file), "val_fraction": 0.1, "packing": "best_fit", "seq_len": 32}
    whole = list(itertools.islice(DataModule(make_config("text", data)).train_dataloader(), 12))
    monkeypatch.setattr("txtrain.data.prepare.write_plan", lambda *_: pytest.fail("planned twice"))
    later = DataModule(make_config("text", {**data, "num_workers": 2}))
    later.start_step = 5
    for a, b in zip(whole[5:], itertools.islice(later.train_dataloader(), 7), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    concat = DataModule(make_config("text", {**data, "packing": "concat"}))
    concat.prepare()
    assert concat.fingerprint != later.fingerprint

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from txtrain.data.samples.packed import PackedSamples
from txtrain.data.store.cache import TokenFile, TokenWriter


def write(folder: Path, documents: list[list[int]], vocab_size: int = 1000) -> TokenFile:
    folder.mkdir(parents=True, exist_ok=True)
    with TokenWriter(folder, vocab_size).open() as writer:
        for ids in documents:
            writer.append("train", ids, ends=True)
    writer.finish()
    return TokenFile(folder, "train")


def test_a_sample_shows_its_documents_and_targets(tmp_path: Path) -> None:
    tokens = write(tmp_path, [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]])
    batch = PackedSamples(tokens, seq_len=5).batch(np.array([0, 1]))
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 1, 2, -100, 4], [4, 5, 6, -100, 8]]


def test_cross_document_attention_keeps_all_targets_and_no_documents(tmp_path: Path) -> None:
    tokens = write(tmp_path, [[0, 1, 2], [3, 4, 5, 6]])
    batch = PackedSamples(tokens, seq_len=4, cross_document_attention=True).batch(np.array([0, 1]))
    assert set(batch) == {"input_ids", "labels"}
    assert torch.equal(batch["labels"], batch["input_ids"])


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30), seq_len=st.integers(2, 9))
def test_every_token_is_a_target_exactly_once(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int) -> None:
    ids = iter(range(sum(lengths)))
    documents = [[next(ids) for _ in range(n)] for n in lengths]
    samples = PackedSamples(write(tmp_path_factory.mktemp("tokens"), documents), seq_len)
    if not len(samples):
        assert sum(lengths) < seq_len
        return
    batch = samples.batch(np.arange(len(samples)))
    targets = batch["labels"][:, 1:]
    covered = len(samples) * (seq_len - 1) + 1  # the rest is shorter than a sample
    firsts = {document[0] for document in documents}
    assert sorted(targets[targets != -100].tolist()) == [i for i in range(1, covered) if i not in firsts]
    of = {i: d for d, document in enumerate(documents) for i in document}
    true_documents = torch.tensor([[of[i] for i in row] for row in batch["input_ids"].tolist()])
    assert torch.equal(batch["document_ids"], true_documents - true_documents[:, :1])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_535, "uint16"), (65_536, "uint32"), (200_000, "uint32")])
def test_ids_are_stored_as_narrow_as_the_vocabulary_allows(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    tokens = write(tmp_path, [[0, vocab_size - 1, 1, 2]], vocab_size)
    assert tokens.ids.dtype == dtype
    assert PackedSamples(tokens, 4).batch(np.array([0]))["input_ids"].tolist() == [[0, vocab_size - 1, 1, 2]]

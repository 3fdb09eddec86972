"""Texts of which only some tokens are trained: from the source through cache and packing to the batch."""

import dataclasses as dc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from txtrain.config.plugins import component
from txtrain.config.schema import Train
from txtrain.data.samples.best_fit import BestFitSamples, write_plan
from txtrain.data.samples.order import GlobalOrder, ShareSampler
from txtrain.data.samples.packed import PackedSamples
from txtrain.data.samples.rows import OrderedSamples, Rows
from txtrain.data.sources.source import Marked
from txtrain.data.store.cache import TokenFile, TokenWriter
from txtrain.data.store.split import MarkedCorpus
from txtrain.data.tokenizer.tokenizer import byte_tokenizer
from txtrain.errors import ConfigError
from txtrain.objectives.base import build_objective
from txtrain.objectives.config import PrefixLMConfig
from txtrain.training.data_module import DataModule

IGNORED = -100


def write(folder: Path, texts: list[Marked], vocab_size: int = 1000) -> TokenFile:
    writer = TokenWriter(folder, vocab_size, marked=True)
    with writer.open():
        for text in texts:
            writer.append_marked("train", text)
    writer.finish()
    return TokenFile(folder, "train")


def rows_of(tokens: TokenFile, packing: str, seq_len: int, folder: Path, across: bool = False) -> Rows:
    if packing == "concat":
        return PackedSamples(tokens, seq_len, across)
    write_plan(tokens, seq_len, folder, together=packing == "best_fit")
    return BestFitSamples(tokens, seq_len, folder, pad_id=0, cross_document_attention=across)


def read(rows: Rows, world_size: int, micro: int, size: int) -> Iterator[tuple[int, list[int], list[int]]]:
    """Row, input_ids and labels of each sample of an epoch, as the ranks read them by micro-batches."""
    order = GlobalOrder(len(rows), size, seed=3)
    samples = OrderedSamples(rows, 3, order)
    shares = [iter(ShareSampler(order, rank, world_size)) for rank in range(world_size)]
    left = len(rows)
    while left > 0:
        for share in shares:
            indices = next(share)
            for at in range(0, len(indices), micro):
                batch = samples.__getitems__(indices[at : at + micro])
                numbers = order.rows(batch["sample_index"].numpy()).tolist()
                for row, ids, labels in zip(
                    numbers, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True
                ):
                    if left > 0:
                        yield row, ids, labels
                    left -= 1


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.lists(st.booleans(), min_size=1, max_size=14), min_size=1, max_size=25),
    seq_len=st.integers(2, 9),
    packing=st.sampled_from(["concat", "best_fit", "none"]),
    across=st.booleans(),
    ranks=st.sampled_from([(1, 4), (2, 1), (4, 1), (2, 2)]),
)
def test_what_is_trained_is_what_the_source_marked(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[list[bool]],
    seq_len: int,
    packing: str,
    across: bool,
    ranks: tuple[int, int],
) -> None:
    folder = tmp_path_factory.mktemp("marked")
    ids = iter(range(1, 1000))
    marked = [Marked([next(ids) for _ in marks], marks, number) for number, marks in enumerate(texts)]
    tokens = write(folder, marked)
    rows = rows_of(tokens, packing, seq_len, folder, across)
    stream = [(i, t and k > 0) for text in marked for k, (i, t) in enumerate(zip(text.ids, text.trained, strict=True))]
    if packing == "concat":  # the rest is shorter than a sample
        stream = stream[: max(0, (len(stream) - 1) // (seq_len - 1)) * (seq_len - 1) + 1]
    wanted = [i for i, trained in stream if trained]
    if not len(rows):
        assert not wanted
        return
    world_size, micro = ranks
    found, seen = [], sorted(read(rows, world_size, micro, 4))
    for row, ids_T, labels_T in seen:
        assert all(label in (IGNORED, i) for i, label in zip(ids_T, labels_T, strict=True))
        targets = [label for label in labels_T[1:] if label != IGNORED]
        assert targets, "a sample without a trained token"
        for text in marked:
            of_text = [i for i in targets if i in text.ids]
            assert of_text == sorted(of_text), "the order within a text"
        assert set(rows.sources(np.array([row]))[0]) == {text.number for text in marked if set(text.ids) & set(ids_T)}
        found.append(targets)
    assert [row for row, _, _ in seen] == list(range(len(rows)))
    each = [i for targets in found for i in targets]
    assert (each if packing != "best_fit" else sorted(each)) == wanted


def test_sources_without_marks_have_the_same_files_as_before(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, 300).open() as writer:
        writer.append("train", [1, 2], ends=True)
    writer.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "meta.json",
        *(f"{s}.{e}" for s in ("train", "validation") for e in ("bin", "offsets.npy")),
    ]
    assert TokenFile(tmp_path, "train").mask is None


@pytest.mark.parametrize(
    ("text", "wrong"),
    [(Marked([1, 2], [True], 7), "a mark for each of its 2 tokens"), (Marked([1, 300], [True] * 2, 7), "0 to 299")],
)
def test_what_does_not_fit_names_its_text(tmp_path: Path, text: Marked, wrong: str) -> None:
    with pytest.raises(ConfigError, match=f"text 7 must .*{wrong}"):
        write(tmp_path, [text], 300)


class Chats:
    """Number k: 4 + k % 3 tokens of value k, of which every second is trained; two texts of each number."""

    def __init__(self, n: int = 40) -> None:
        self.n = n

    def identity(self) -> str:
        return f"chats {self.n}"

    def documents(self, split: str) -> Iterator[str]:
        return (f"chat {k}" for k in range(self.n))

    def marked(self, split: str, tokenizer: Any) -> Iterator[Marked]:
        for k in range(self.n):
            n = 4 + k % 3
            yield from [Marked([k] * n, [i % 2 == 1 for i in range(n)], k)] * 2


@pytest.mark.parametrize("n", [2, 3, 19, 20, 60])
def test_texts_of_one_number_are_on_one_side(n: int) -> None:
    sides: dict[int, set[str]] = {}
    for split, text in MarkedCorpus(Chats(n), 0.05, byte_tokenizer()).documents():
        sides.setdefault(text.number, set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    assert sum(side == {"validation"} for side in sides.values()) == max(1, n // 20)


def _config(make_config: Callable[..., Train], **data: Any) -> Train:
    component("data", "chats")(Chats)
    return make_config("chats", {"n": 40, "seq_len": 8, **data})


@pytest.mark.usefixtures("own_axis")
@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
def test_the_loss_counts_trained_tokens_alone(make_config: Callable[..., Train], packing: str) -> None:
    config = _config(make_config, packing=packing)
    data = DataModule(config)
    data.prepare()
    objective = build_objective(config)
    n = 0
    for batch, sources in data.first(None):
        trained = batch["labels"][:, 1:] != IGNORED
        assert trained.any(dim=1).all()
        assert int(objective.denominators(batch)["loss"]) == int(trained.sum())
        assert torch.equal(objective.target_ids(batch), batch["labels"][:, 1:][trained])
        assert [sorted(set(ids.tolist()) - {256}) for ids in batch["input_ids"]] == [
            sorted(set(numbers)) for numbers in sources
        ]
        n += int(trained.sum())
    held = {n for _, sources in data.first(None, "validation") for numbers in sources for n in numbers}
    wanted = sum(2 * ((4 + k % 3) // 2) for k in range(40) if k not in held)
    assert n == wanted or (packing == "concat" and wanted - 7 <= n < wanted)


@pytest.mark.usefixtures("own_axis")
def test_an_objective_that_would_train_everything_is_refused(make_config: Callable[..., Train]) -> None:
    config = dc.replace(_config(make_config), objective=PrefixLMConfig(type="prefix_lm"))
    with pytest.raises(ConfigError, match=r"`objective` must be causal_lm or sft .*for chat, which data.path holds, but is prefix_lm"):
        DataModule(config).prepare()


def test_fingerprints_of_plain_text_are_those_of_before(make_config: Callable[..., Train], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i}\n" for i in range(200)))
    found = {}
    for packing in ("concat", "best_fit"):
        data = DataModule(make_config("text", {"path": str(path), "packing": packing}))
        data.prepare()
        found[packing] = data.fingerprint
    assert found == {"concat": "4f09a49ba427cff6", "best_fit": "c127618ac7477357"}

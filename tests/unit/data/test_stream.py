"""A set that is read as it comes: the same tokens as from a cache, and a position that is exact."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from txtrain.data.sources import hub
from txtrain.data.store.split import is_held_out
from txtrain.data.store.stream import Position, StreamTokens
from txtrain.data.tokenizer.tokenizer import byte_tokenizer
from txtrain.errors import ConfigError
from txtrain.training.data_module import DataModule

TEXTS = [f"row {i} {'x' * (i * 7 % 40)}" if i % 11 else " " for i in range(90)]


@pytest.fixture
def config(make_config, tmp_path: Path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    hub.load_dataset.cache_clear()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return lambda **data: make_config("hf", {"path": str(path), "streaming": True, "val_fraction": 0.1, **data}, trainer={"limit_val_batches": 2})


def batches(module: DataModule, n: int) -> list[dict[str, torch.Tensor]]:
    return list(itertools.islice(module.train_dataloader(), n))


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x if k != "stream_position")


def test_samples_are_the_training_rows_in_their_order_epoch_after_epoch(config) -> None:
    kept = [t for i, t in enumerate(TEXTS) if t.strip() and not is_held_out(i, 0.1)]
    epoch = [i for text in kept for i in (256, *text.encode(), 256)]
    seen = batches(DataModule(config()), 90)
    ids = torch.cat([b["input_ids"] for b in seen])
    assert ids.numel() > 2 * len(epoch)
    stream = list(itertools.islice(itertools.cycle(epoch), len(ids) * 15 + 1))
    assert ids.tolist() == [stream[i * 15 : i * 15 + 16] for i in range(len(ids))]
    first = set(itertools.accumulate([0, *(len(t.encode()) + 2 for t in kept * 3)]))
    assert [int(b["labels"][0, 0]) == -100 for b in seen] == [i * 4 * 15 in first for i in range(90)]


@pytest.mark.parametrize(("k", "workers"), [(1, 0), (7, 0), (40, 0), (7, 1)])
def test_a_resume_reads_on_at_the_exact_place(config, k: int, workers: int, monkeypatch) -> None:
    whole = batches(DataModule(config()), k + 6)
    position = Position(*whole[k - 1]["stream_position"][-1].tolist())
    later = DataModule(config(num_workers=workers))
    later.start_step, later.start_position = k, position
    if not workers:
        later.prepare()
        opened: list[int] = []
        monkeypatch.setattr(later._stream, "rows_from", lambda row, given=later._stream.rows_from: (opened.append(row), given(row))[1])
    assert same(batches(later, 6), whole[k:])
    if not workers:
        assert opened[0] == position.row, "rows before the position were read"
        assert position.row > 0 or k == 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_steps_and_any_of_them_tells_where_to_go_on(config, world_size: int) -> None:
    whole = batches(DataModule(config()), 12)
    parts = []
    for rank in range(world_size):
        module = DataModule(config())
        module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
        parts.append(batches(module, 8))
        later = DataModule(config())
        later.start_step, later.start_position = 8, Position(*parts[-1][-1]["stream_position"][-1].tolist())
        assert same(batches(later, 4), whole[8:])
    assert same([{k: torch.cat([part[k] for part in step]) for k in step[0]} for step in zip(*parts, strict=True)], whole[:8])


def test_a_set_smaller_than_a_step_gives_every_rank_as_many_steps(config, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "only this one row"}\n' * 2)
    counts = []
    for rank in range(4):
        module = DataModule(config(path=str(few), val_path=str(tmp_path / "rows.jsonl")))
        module.trainer = SimpleNamespace(global_rank=rank, world_size=4)
        counts.append([tuple(b["input_ids"].shape) for b in batches(module, 20)])
    assert counts == [[(1, 16)] * 20] * 4


def test_validation_is_held_out_rows_and_no_more_than_is_read(config) -> None:
    module = DataModule(config(val_fraction=0.3))
    val = list(module.val_dataloader())
    text = module.tokenizer.decode(torch.cat([b["input_ids"] for b in val]).flatten().tolist())
    numbers = {int(word) for word in text.replace("row", " ").split() if word.isdigit()}
    assert numbers
    assert all(is_held_out(i, 0.3) for i in numbers if f"row {i} " in text)
    assert sum(len(b["input_ids"]) for b in val) == 8


def test_reading_back_starts_again(config) -> None:
    stream = StreamTokens(lambda first: iter(list(enumerate(["ab", "cd", "ef"]))[first:]), byte_tokenizer())
    late, early = stream.windows(np.array([16]), 4), stream.windows(np.array([0]), 4)
    assert (late.tolist(), early.tolist()) == ([[256, 99, 100, 256]], [[256, 97, 98, 256]])  # 16: the second document of the second epoch


def test_mistakes(config, tmp_path: Path) -> None:
    assert "`data.num_workers` must be 0 or 1" in next(iter(config(num_workers=2).data.check()))
    assert "`data.tokenizer` must be bytes" in next(iter(config(tokenizer="train").data.check()))
    for data, says in (
        ({"split": "train[:50%]"}, r"`data\.split` must be the name of a split with data\.streaming=true"),
        ({"val_split": "train"}, r"`data\.val_split` must not be data\.split"),
        ({"text_column": "txt"}, r"`data\.text_column` must be one of text for"),
    ):
        with pytest.raises(ConfigError, match=says):
            DataModule(config(**data)).prepare()
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": " "}\n')
    with pytest.raises(ConfigError, match="the stream ended without a document"):
        batches(DataModule(config(path=str(blank), val_path=str(tmp_path / "rows.jsonl"))), 1)

"""A set that is read as it comes: its order does not depend on the processes, and a position is exact."""

import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from txtrain.data.sources import hub
from txtrain.data.sources.hub_text import HubStream
from txtrain.data.store import stream as store
from txtrain.data.store.split import is_held_out
from txtrain.data.store.stream import StreamOrder, StreamTokens
from txtrain.data.store.stream_position import Position, furthest, positions
from txtrain.errors import ConfigError
from txtrain.training.data_module import DataModule

TEXTS = [f"row {i} {'x' * (i * 7 % 40)}" if i % 11 else " " for i in range(90)]
KEPT = [t for i, t in enumerate(TEXTS) if t.strip() and not is_held_out(i, 0.1)]
AS_IT_COMES = {"stream_readers": 1, "shuffle_buffer": 0}
WAYS = {"as it comes": AS_IT_COMES, "rows": {"stream_readers": 4, "shuffle_buffer": 5}, "files": {"stream_readers": 4, "shuffle_buffer": 5}}


@pytest.fixture
def config(make_config, tmp_path: Path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    hub.load_dataset.cache_clear()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "files").mkdir()
    for k in range(6):  # of which each has another number of rows
        some = TEXTS[k * (k + 1) * 2 : (k + 1) * (k + 2) * 2]
        pq.write_table(pa.table({"text": some}), tmp_path / f"files/{k}.parquet", row_group_size=3)

    def made(way: str | None = None, **data):
        given = {"streaming": True, "val_fraction": 0.1, "path": str(tmp_path / "files" if way == "files" else path)}
        return make_config("hf", {**given, **WAYS.get(way, {}), **data}, trainer={"limit_val_batches": 2})

    return made


def batches(module: DataModule, n: int) -> list[dict[str, torch.Tensor]]:
    return list(itertools.islice(module.train_dataloader(), n))


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x if k != "stream_position")


def at(*ranks) -> tuple[Position, ...]:
    """Where a run goes on behind these ranks' batches, as a checkpoint has it."""
    found = [batch["stream_position"][-1].tolist() for batch in ranks]
    return positions(furthest(found), len(found[0]))


def test_one_reader_reads_the_training_rows_in_their_order_epoch_after_epoch(config) -> None:
    epoch = [i for text in KEPT for i in (256, *text.encode(), 256)]
    seen = batches(DataModule(config(**AS_IT_COMES)), 90)
    ids = torch.cat([b["input_ids"] for b in seen])
    assert ids.numel() > 2 * len(epoch)
    stream = list(itertools.islice(itertools.cycle(epoch), len(ids) * 15 + 1))
    assert ids.tolist() == [stream[i * 15 : i * 15 + 16] for i in range(len(ids))]
    first = set(itertools.accumulate([0, *(len(t.encode()) + 2 for t in KEPT * 3)]))
    assert [int(b["labels"][0, 0]) == -100 for b in seen] == [i * 4 * 15 in first for i in range(90)]


@pytest.mark.parametrize(("k", "workers"), [(1, 0), (7, 0), (40, 0), (7, 1)])
@pytest.mark.parametrize("way", WAYS)
def test_a_resume_reads_on_at_the_exact_place(config, way: str, k: int, workers: int) -> None:
    whole = batches(DataModule(config(way)), k + 6)
    later = DataModule(config(way, num_workers=workers))
    later.start_step, later.start_position = k, at(whole[k - 1])
    assert same(batches(later, 6), whole[k:])


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_ranks_share_the_same_steps_and_a_resume_may_have_others(config, way: str, world_size: int) -> None:
    whole = batches(DataModule(config(way)), 12)
    parts = []
    for rank in range(world_size):
        module = DataModule(config(way))
        module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
        parts.append(batches(module, 8))
    assert same([{k: torch.cat([part[k] for part in step]) for k in step[0]} for step in zip(*parts, strict=True)], whole[:8])
    for rank, n in ((0, 1), (1, 2)):
        later = DataModule(config(way))
        later.trainer = SimpleNamespace(global_rank=rank, world_size=n)
        later.start_step, later.start_position = 8, at(*(part[-1] for part in parts))
        share = slice(rank * 4 // n, (rank + 1) * 4 // n)
        assert same(batches(later, 4), [{k: x[share] for k, x in batch.items()} for batch in whole[8:]])


def test_a_set_smaller_than_a_step_gives_every_rank_as_many_steps(config, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "only this one row"}\n' * 2)
    counts = []
    for rank in range(4):
        module = DataModule(config(path=str(few), val_path=str(tmp_path / "rows.jsonl")))
        module.trainer = SimpleNamespace(global_rank=rank, world_size=4)
        counts.append([tuple(b["input_ids"].shape) for b in batches(module, 20)])
    assert counts == [[(1, 16)] * 20] * 4


def held_out_and_trained(module: DataModule) -> tuple[set[int], list[int]]:
    """Numbers in the texts of the validation samples, of which the first digits may be cut off, and in those of an epoch."""
    val = torch.cat([b["input_ids"] for b in module.val_dataloader()]).flatten().tolist()
    found = [module.tokenizer.decode(val)]
    for reader in range(module._stream.n_readers):
        epoch = itertools.takewhile(lambda it: it[0].epoch == 0, module._stream._reader(reader)._read(Position()))
        found.append(" ".join(module.tokenizer.decode(ids) for _, _, ids in epoch))
    val, *trained = ([int(word) for word in text.replace("row", " ").split() if word.isdigit()] for text in found)
    return {i for i in val if i > 9}, sorted(itertools.chain(*trained))


def test_validation_is_held_out_rows_and_no_more_than_is_read(config) -> None:
    module = DataModule(config(val_fraction=0.3))
    numbers, trained = held_out_and_trained(module)
    assert numbers
    assert all(is_held_out(i, 0.3) for i in numbers)
    assert trained == [i for i in range(90) if i % 11 and not is_held_out(i, 0.3)]
    assert sum(len(b["input_ids"]) for b in module.val_dataloader()) == 8


def test_files_number_their_rows_by_themselves_for_validation(config) -> None:
    numbers, trained = held_out_and_trained(DataModule(config("files", val_fraction=0.3)))
    first = [0, 4, 12, 24, 40, 60, 84]
    held_out = {f + i for f, end in itertools.pairwise(first) for i in range(end - f) if is_held_out(i, 0.3)}
    assert numbers
    assert numbers <= held_out
    assert trained == [i for i in range(84) if i % 11 and i not in held_out]


def test_mistakes(config, tmp_path: Path) -> None:
    assert "`data.num_workers` must be 0 or 1" in next(iter(config(num_workers=2).data.check()))
    assert "`data.tokenizer` must be bytes" in next(iter(config(tokenizer="train").data.check()))
    assert "`data.shuffle_buffer` must not be given" in next(iter(config(streaming=False, shuffle_buffer=2).data.check()))
    for data, says in (
        ({"split": "train[:50%]"}, r"`data\.split` must be the name of a split with data\.streaming=true"),
        ({"val_split": "train"}, r"`data\.val_split` must not be data\.split"),
        ({"text_column": "txt"}, r"`data\.text_column` must be one of text for"),
    ):
        with pytest.raises(ConfigError, match=says):
            DataModule(config(**data)).prepare()
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": " "}\n')
    for way in WAYS:
        with pytest.raises(ConfigError, match="the stream ended without a document"):
            batches(DataModule(config(way, path=str(blank), val_path=str(tmp_path / "rows.jsonl"))), 1)
    with pytest.raises(ConfigError, match=r"`data\.stream_readers` must be 2, as in the checkpoint, but is 8"):
        positions(range(16), 8)


# ------------------------------------------------------------------------------------------ readers, on a counted source


class Counted:
    """Files of texts, of which each three rows are a part; counts the rows that are read, and those that become text."""

    def __init__(self, files: list[list[str]], by_files: bool) -> None:
        self.files, self.n_files, self.by_files = files, len(files), by_files
        self.read, self.decoded = Counter(), Counter()

    def stream(self, file: int, part: int = 0):
        rows = self.files[file]
        for i in range(part * 3, len(rows), 3):
            self.read.update((file, i + k) for k in range(len(rows[i : i + 3])))
            yield i // 3, pa.array([text.encode() for text in rows[i : i + 3]], pa.large_binary())

    def text(self, raw: bytes, number: int, file: int) -> str:
        self.decoded[raw] += 1
        return raw.decode()


BYTES = SimpleNamespace(bos_id=256, eos_id=256, encode_batch=lambda texts: [list(text.encode()) for text in texts])


def tokens(source: Counted, readers: int, buffer: int, seed: int = 0, start=None) -> StreamTokens:
    return StreamTokens(source, BYTES, seed, readers, buffer, start)


def samples(stream: StreamTokens, numbers: list[int], T: int = 8) -> list[list[int]]:
    return stream.windows(stream.begins(np.array(numbers), T - 1), T).tolist()


def words(stream: StreamTokens, reader: int, n: int) -> list[str]:
    """The first n documents of a reader."""
    row = stream.windows(stream.begins(np.array([reader]), 7), 8 * n)[0].tolist()
    return [bytes(ids).decode() for new, ids in itertools.groupby(row, lambda i: i >= 256) if not new][:n]


def rows(n: int, width: int = 4) -> list[str]:
    return [f"{i:0{width}d}" for i in range(n)]


@pytest.mark.parametrize("by_files", [True, False])
def test_a_process_decodes_and_tokenises_its_own_readers_rows_alone(by_files: bool) -> None:
    files = [rows(1000)[i::8] for i in range(8)]
    shares = []
    for rank in range(2):
        source = Counted(files, by_files)
        order = StreamOrder(1 << 40, 16, 0, n_readers=8, buffer=10)
        stream = tokens(source, 8, 10)
        for step in range(40):
            samples(stream, order.indices(step)[rank * 8 : rank * 8 + 8].tolist())
        assert len(stream._readers) == 4
        shares.append(set(source.decoded))
        if by_files:
            assert len({file for file, _ in source.read}) == 4, "files of another process were read"
        else:  # all four readers in one pass
            assert set(source.read.values()) == {1}
    assert not shares[0] & shares[1]
    assert 0.8 < len(shares[0]) / len(shares[1]) < 1.25


def test_a_resume_reads_a_block_again_and_nothing_before_it() -> None:
    for by_files, readers in ((True, 4), (False, 4), (False, 1)):
        files = [rows(600, 9)[i::5] for i in range(5)]
        source = Counted(files, by_files)
        stream = tokens(source, readers, 12)
        for i in range(0, 840, 4):
            samples(stream, [*range(i, i + 4)])
        start = positions(stream.position.ravel().tolist(), readers)
        read = sum(source.read.values())
        again = Counted(files, by_files)
        later = tokens(again, readers, 12, start=start)
        assert samples(later, [840, 841, 842, 843]) == samples(stream, [840, 841, 842, 843])
        n_again = sum(again.read.values())
        assert n_again <= (readers * (2 * 12 + 3) if by_files else (store._KEPT + 1) * readers * 12 + 3) < read
        assert sum(again.decoded.values()) <= readers * 32


@pytest.mark.parametrize("by_files", [True, False])
def test_rows_are_shuffled_within_blocks_otherwise_for_each_seed_epoch_and_reader(by_files: bool) -> None:
    files = [rows(240)[i::2] for i in range(2)] if by_files else [rows(240)]
    made = {seed: [words(tokens(Counted(files, by_files), 2, 20, seed), r, 300) for r in range(2)] for seed in (0, 1)}
    plain = [words(tokens(Counted(files, by_files), 2, 0), r, 300) for r in range(2)]
    for reader in range(2):
        one, other = made[0][reader], made[1][reader]
        for block in range(0, 120, 20):  # each a permutation of the same rows
            assert one[block : block + 20] != other[block : block + 20] != plain[reader][block : block + 20]
            assert sorted(one[block : block + 20]) == sorted(other[block : block + 20]) == plain[reader][block : block + 20]
        assert [one.index(word) for word in plain[reader][:20]] != [made[0][1 - reader].index(word) for word in plain[1 - reader][:20]]
        assert sorted(one[120:240]) == sorted(plain[1 - reader][:120]), "the second epoch has the other share"
        assert one[120:240] != made[0][1 - reader][:120]
    everywhere = Counter(word for reader in made[0] for word in reader[:240])
    assert set(everywhere.values()) == {2}


def test_a_block_has_no_more_text_than_fits(monkeypatch) -> None:
    monkeypatch.setattr(store, "_BLOCK_BYTES", 50)
    source = Counted([rows(8, 20), rows(3, 200)], False)
    blocks = list(itertools.islice(tokens(source, 1, 100)._blocks(0, Position()), 7))
    assert [len(block.texts) for block in blocks] == [2, 2, 2, 2, 1, 1, 1]


def test_readers_that_part_go_on_by_themselves_and_memory_stays_bounded() -> None:
    long, short = "x" * 200, "y"
    texts = [f"{i} {long if i % 2 else short}" for i in range(4000)]
    source = Counted([texts], False)
    stream = tokens(source, 2, 10)
    numbers = [[i, i + 1] for i in range(0, 600, 2)]
    together = [samples(stream, pair, 64) for pair in numbers]
    assert len({id(reading) for reading in stream._readings.values()}) == 2
    apart = [samples(tokens(Counted([texts], False), 2, 10), [i for pair in numbers for i in pair if i % 2 == r], 64) for r in range(2)]
    assert [pair[r] for r in range(2) for pair in together] == [*apart[0], *apart[1]]


def test_reading_back_starts_again() -> None:
    stream = tokens(Counted([["ab", "cd", "ef"]], False), 1, 0)
    late, early = stream.windows(np.array([16]), 4), stream.windows(np.array([0]), 4)
    assert (late.tolist(), early.tolist()) == ([[256, 99, 100, 256]], [[256, 97, 98, 256]])  # 16: the second document of the second epoch


def test_a_position_of_version_0_1_0_is_read() -> None:
    files = [rows(5), rows(9), rows(4)]
    whole = samples(tokens(Counted(files, False), 1, 0), [*range(60)])
    for row in range(18):  # a token before each of the second epoch's rows: all have 6 tokens
        for epoch in (0, 1):
            token = 6 * (18 * epoch + row)
            stream = tokens(Counted(files, False), 1, 0, start=positions([token, epoch, row], 1))
            first = -(-token // 7)
            assert samples(stream, [*range(first, first + 20)]) == whole[first : first + 20]


ANY = hypothesis.given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any), readers=st.integers(1, 6), buffer=st.integers(0, 7),
    seed=st.integers(0, 3), G=st.integers(1, 3), P=st.integers(1, 4), Q=st.integers(1, 4), k=st.integers(1, 5), limit=st.integers(3, 40),
)


def check_order(sizes, readers, buffer, seed, G, P, Q, k, limit) -> None:
    names = iter(rows(100))
    files = [[next(names) + "z" * (i % 3) for i in range(n)] for n in sizes]
    by_files = 1 < readers <= len(files)
    order = StreamOrder(1 << 40, G * P * Q, seed, n_readers=readers, buffer=buffer)

    def steps(first: int, last: int, n_ranks: int, start=None):
        found, end = [[] for _ in range(first, last)], []
        for rank in range(n_ranks):
            stream = tokens(Counted(files, by_files), readers, buffer, seed, start)
            share = G * P * Q // n_ranks
            for step in range(first, last):
                found[step - first] += samples(stream, order.indices(step)[rank * share : (rank + 1) * share].tolist())
            end.append(stream.position.tolist())
        return found, positions(furthest(end), readers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_BLOCK_BYTES", limit)
        whole, _ = steps(0, k + 2, 1)
        before, position = steps(0, k, P)
        after, _ = steps(k, k + 2, Q, position)
    assert before + after == whole


test_the_order_depends_on_neither_processes_nor_a_resume = hypothesis.settings(max_examples=15, deadline=None)(ANY(check_order))


@pytest.mark.slow
@hypothesis.settings(max_examples=500, deadline=None)
@ANY
def test_the_order_depends_on_neither_processes_nor_a_resume_in_many_cases(**case) -> None:
    check_order(**case)


def test_a_file_begins_at_a_row_group_where_the_library_can(config, tmp_path: Path, monkeypatch) -> None:
    source = HubStream(str(tmp_path / "files"), None, "train", None, None, "text", 0.1, 4)
    assert (source.n_files, source.by_files) == (6, True)
    whole = [(part, text) for part, column in source.stream(5) for text in column.to_pylist()]
    assert [text.decode() for _, text in whole] == TEXTS[60:84]
    assert [part for part, _ in whole] == [i // 3 for i in range(24)]
    assert [text for _, column in source.stream(5, 6) for text in column.to_pylist()] == [text for _, text in whole[18:]]

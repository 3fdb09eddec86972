import dataclasses as dc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import txtrain
from txtrain.data.store.split import digest
from txtrain.errors import ConfigError
from txtrain.training.data_module import DataModule


@pytest.fixture
def config(make_config, corpus_file: Path):
    return make_config("text", {"path": str(corpus_file), "val_fraction": 0.1})


def with_data(config, **data):
    return dc.replace(config, data=dc.replace(config.data, **data))


def with_trainer(config, **trainer):
    return dc.replace(config, trainer=dc.replace(config.trainer, **trainer))


def batches(module: DataModule, n: int) -> list[dict[str, torch.Tensor]]:
    return list(itertools.islice(module.train_dataloader(), n))


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


# --------------------------------------------------------------------------------------------------------------------- order


def test_batches_have_the_promised_keys_shapes_and_types(config) -> None:
    (batch,) = batches(DataModule(config), 1)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in batch.items()} == {
        "input_ids": (torch.int64, (4, 16)),
        "labels": (torch.int64, (4, 16)),
        "document_ids": (torch.int64, (4, 16)),
        "sample_index": (torch.int64, (4,)),
    }


def test_order_depends_on_the_seed_and_on_nothing_else(config) -> None:
    plain = batches(DataModule(config), 30)
    for other in (with_data(config, num_workers=2), with_data(config, micro_batch_size=1)):
        assert same(batches(DataModule(other), 30), plain)
    assert not same(batches(DataModule(dc.replace(config, seed=1)), 30), plain)


def test_start_step_continues_where_a_run_stopped(config) -> None:
    whole = batches(DataModule(config), 12)
    resumed = DataModule(config)
    resumed.start_step = 5
    assert same(batches(resumed, 7), whole[5:])
    assert [int(b["sample_index"][0]) for b in whole] == [4 * s for s in range(12)]


def test_ranks_share_the_same_global_steps(config) -> None:
    whole = batches(DataModule(config), 3)
    shares = []
    for rank in range(2):
        module = DataModule(config)
        module.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        shares.append(batches(module, 3))
    joined = [{k: torch.cat([a[k], b[k]]) for k in a if k != "_"} for a, b in zip(*shares, strict=True)]
    assert same(joined, whole)


def test_a_batch_that_processes_cannot_share_is_refused_with_the_nearest(config) -> None:
    module = DataModule(config)
    module.trainer = SimpleNamespace(global_rank=0, world_size=3)
    with pytest.raises(ConfigError, match=r"multiple of the 3 processes, but is 4 instead\. Nearest: 3, 6"):
        module.train_dataloader()


def test_overfit_batches_repeats_the_first_steps(config) -> None:
    plain = batches(DataModule(config), 2)
    assert same(batches(DataModule(with_trainer(config, overfit_batches=2)), 6), plain * 3)


def test_order_hash_tells_orders_apart(config) -> None:
    one, again, other = DataModule(config), DataModule(config), DataModule(dc.replace(config, seed=1))
    for module in (one, again, other):
        module.prepare()
    assert one.order_hash(7) == again.order_hash(7)
    assert len({one.order_hash(7), one.order_hash(8), other.order_hash(7)}) == 3


def test_loaders_leave_the_global_generator_alone(config) -> None:
    module = DataModule(config)
    module.prepare()
    before = torch.get_rng_state()
    batches(module, 2)
    list(module.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------------- validation


def test_validation_is_the_same_every_time_and_no_training_text(config) -> None:
    module = DataModule(config)
    val = list(module.val_dataloader())
    assert same(val, list(module.val_dataloader()))
    assert same(val, list(DataModule(dc.replace(config, seed=5)).val_dataloader()))
    assert sum(len(b["input_ids"]) for b in val) == module.n_val
    epoch = batches(module, -(-module.n_train // 4))
    text = {split: "".join(module.tokenizer.decode(row[1:]) for b in part for row in b["input_ids"]) for split, part in (("train", epoch), ("val", val))}
    assert "line 39 of" in text["val"]
    assert "line 39 of" not in text["train"]


def test_limited_validation_is_spread_over_the_whole_set(config) -> None:
    module = DataModule(with_trainer(config, limit_val_batches=1))
    (batch,) = module.val_dataloader()
    assert batch["sample_index"].tolist() == [i * module.n_val // 4 for i in range(4)]
    assert list(DataModule(with_trainer(config, limit_val_batches=0)).val_dataloader()) == []


def test_prompts_are_first_words_of_validation_documents(make_config, tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{i:03}.txt").write_text(f"This is text {i:03} and it goes on for a while.\n")
    module = DataModule(make_config("text", {"path": str(tmp_path)}))
    prompts = module.prompts(3)
    assert [p[:12] for p in prompts] == ["This is text"] * 3
    assert all(p.endswith("and it") for p in prompts)
    assert len(set(prompts)) == 3


# ----------------------------------------------------------------------------------------------------------- cache, tokenizer


def test_the_second_time_nothing_is_tokenised(config, monkeypatch) -> None:
    first = DataModule(config)
    first.prepare()
    monkeypatch.setattr("txtrain.data.prepare.tokenise", lambda *_: pytest.fail("tokenised twice"))
    for other in (config, with_data(config, seq_len=8, global_batch_size=2)):
        DataModule(other).prepare()
    assert len(list(Path(os.environ["TXTRAIN_CACHE"]).iterdir())) == 1


def test_fingerprint_follows_text_tokenizer_and_packing(config, corpus_file: Path) -> None:
    def fingerprint(changed) -> str:
        module = DataModule(changed)
        module.prepare()
        return module.fingerprint

    same_for = [config, with_data(config, num_workers=2), with_data(config, global_batch_size=2), dc.replace(config, seed=3)]
    assert len({fingerprint(c) for c in same_for}) == 1
    changes = [with_data(config, **c) for c in ({"seq_len": 8}, {"cross_document_attention": True}, {"val_fraction": 0.2}, {"tokenizer": "train"})]
    assert len({fingerprint(c) for c in [config, *changes]}) == 5
    before = fingerprint(config)
    corpus_file.write_text(corpus_file.read_text() + "more\n")
    assert fingerprint(config) != before


def test_trained_tokenizer_sees_training_text_only_and_is_cached(config, monkeypatch, caplog) -> None:
    config = with_data(config, tokenizer="train")
    module = DataModule(config)
    module.prepare()
    assert module.tokenizer.vocab_size <= 512
    assert f"{module.tokenizer.vocab_size} tokens" in caplog.text
    monkeypatch.setattr("txtrain.data.fitted_tokenizer.train_tokenizer", lambda *_: pytest.fail("trained twice"))
    again = DataModule(with_data(config, seq_len=8))
    again.prepare()
    assert again.tokenizer.fingerprint == module.tokenizer.fingerprint


def test_a_trained_tokenizer_reads_a_bounded_sample_and_says_so(config, corpus_file: Path, caplog) -> None:
    lines = "".join(f"line {i} of a long text\n" for i in range(60_000))
    corpus_file.write_text(lines + "zqzq " * 60_000)  # longer than the sample, which has a part of every part
    module = DataModule(with_data(config, tokenizer="train", tokenizer_sample=1_000_000))
    module.prepare()
    assert "1,000,000 of the text's 1," in caplog.text
    assert max(len(module.tokenizer.encode(word)) for word in ("line", "zqzq")) < 4


def test_token_bytes_of_all_targets_add_up_to_the_text(config, corpus_file: Path) -> None:
    module = DataModule(with_data(config, seq_len=2))
    total = sum(int(module.token_bytes[b["labels"][:, 1:][b["labels"][:, 1:] != -100]].sum()) for b in [*epoch(module), *module.val_dataloader()])
    assert total == len(corpus_file.read_bytes())


def epoch(module: DataModule) -> Iterator[dict[str, torch.Tensor]]:
    module.prepare()
    n, size = module.n_train, module.config.data.global_batch_size
    for batch in batches(module, -(-n // size)):
        keep = batch["sample_index"] < n
        yield {k: v[keep] for k, v in batch.items()}


# ------------------------------------------------------------------------------------------------------------------ mistakes


def test_a_tokenizer_larger_than_the_models_vocabulary_names_both_numbers(make_config, corpus_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size.*257.*but is 200 instead"):
        DataModule(make_config("text", {"path": str(corpus_file)}, vocab_size=200)).prepare()


def test_a_text_shorter_than_one_sequence_says_how_much_there_is(make_config, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("one line of text that is rather short\nand its end\n")
    with pytest.raises(ConfigError, match=r"data\.seq_len.*at most \d+, the tokens of the training text \(1 documents\), but is 100 instead"):
        DataModule(make_config("text", {"path": str(path), "seq_len": 100})).prepare()
    with pytest.raises(ConfigError, match=r"validation text.*val_fraction"):
        DataModule(make_config("text", {"path": str(path), "seq_len": 30})).prepare()
    path.write_text("  \n ")
    with pytest.raises(ConfigError, match="must have training text, but has none"):
        DataModule(make_config("text", {"path": str(path)})).prepare()


# -------------------------------------------------------------------------------------------------------------- user's source


@pytest.mark.usefixtures("own_axis")
def test_an_own_text_source_trains_like_any_other(make_config) -> None:
    @txtrain.component("data", "counting")
    class Counting:
        def __init__(self, up_to: int = 500) -> None:
            self.up_to = up_to

        def documents(self, split):
            return (f"{i} comes before {i + 1}" for i in range(self.up_to))

    module = DataModule(make_config("counting", {"up_to": 600}))
    module.prepare()
    assert module.source == "counting"
    assert 0.04 < module.n_val / (module.n_val + module.n_train) < 0.06
    assert len(batches(module, 2)) == 2


@pytest.mark.usefixtures("own_axis")
def test_an_own_source_of_samples_needs_no_tokenizer(make_config) -> None:
    @txtrain.component("data", "copy")
    class Copy:
        """The second half of each sequence repeats the first."""

        def __init__(self, vocab_size: int, seq_len: int, n: int = 200) -> None:
            self.vocab_size, self.half, self.n = vocab_size, seq_len // 2, n

        def samples(self, split):
            return self

        def __len__(self) -> int:
            return self.n

        def __getitem__(self, i: int):
            half = np.random.default_rng(i).integers(0, self.vocab_size, self.half).tolist()
            return {"input_ids": half + half, "labels": [-100] * self.half + half}

    module = DataModule(make_config("copy"))
    (batch,) = batches(module, 1)
    assert (module.tokenizer, module.token_bytes, module.prompts(3)) == (None, None, [])
    assert (module.n_train, module.n_val) == (190, 10)
    assert batch["input_ids"].shape == (4, 16)
    assert torch.equal(batch["labels"][:, 8:], batch["input_ids"][:, :8])
    assert set(batch) == {"input_ids", "labels", "sample_index"}
    train = {tuple(row) for b in epoch(module) for row in b["input_ids"].tolist()}
    assert not train & {tuple(row) for b in module.val_dataloader() for row in b["input_ids"].tolist()}
    kept = repr([Copy(512, 16)[i] for i in (0, 100, 199)])
    told = (
        "CopyConfig(type='copy', tokenizer='bytes', seq_len=16, global_batch_size=4, micro_batch_size=None, cross_document_attention=False, "
        "packing='concat', val_fraction=0.05, num_workers=0, cache_dir=None, n=200)"
    )
    assert module.fingerprint == digest(told, 190, 10, kept), "that of version 0.1.0"
    for keys, same in (({"micro_batch_size": 2, "num_workers": 1, "cache_dir": "x"}, True), ({"n": 201}, False), ({"tokenizer_sample": 2_000_000}, False)):
        other = DataModule(make_config("copy", keys))
        other.prepare()
        assert (other.fingerprint == module.fingerprint) is same, keys


@pytest.mark.usefixtures("own_axis")
def test_samples_of_several_lengths_are_refused(make_config) -> None:
    @txtrain.component("data", "ragged")
    class Ragged:
        def samples(self, split):
            return [{"input_ids": [1] * (3 + i % 2)} for i in range(100)]

    with pytest.raises(ConfigError, match="'input_ids' must have one shape"):
        batches(DataModule(make_config("ragged")), 1)

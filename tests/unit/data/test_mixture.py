"""Which source a sample is from is arithmetic, in exact proportions."""

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from txtrain.data.samples.order import OrderHash
from txtrain.data.sources.mixture import MixtureOrder
from txtrain.data.sources.text import TextFiles
from txtrain.errors import ConfigError
from txtrain.registry import out_of_range
from txtrain.training.data_module import DataModule

WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=6)


def order(weights: list[float], sizes: list[int] | None = None, size: int = 8, seed: int = 0, **more) -> MixtureOrder:
    shares = tuple(Fraction(repr(w)) / sum(Fraction(repr(v)) for v in weights) for w in weights)
    sizes = sizes or [100] * len(weights)
    return MixtureOrder(sum(sizes), size, seed, sizes=tuple(sizes), shares=shares, **more)


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 2**40), blocks=st.integers(1, 4))
def test_proportions_are_exact_at_the_end_of_every_block(weights: list[int], seed: int, blocks: int) -> None:
    mixed = order(weights, seed=seed)
    n = mixed.block * blocks
    source, which = mixed.place(np.arange(n))
    for k, share in enumerate(mixed.shares):
        mine = which[source == k]
        assert abs(len(mine) - share * n) < 1, f"source {k}: {len(mine)} of {n} samples, its share is {float(share * n):.3f}"
        assert sorted(mine.tolist()) == list(range(len(mine))), "each of its samples once, none left out"
        assert len(mine) > 0


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 2**40), begin=st.integers(0, 3000), n=st.integers(1, 700))
def test_a_place_is_a_function_of_the_seed_and_the_index_alone(weights: list[int], seed: int, begin: int, n: int) -> None:
    mixed = order(weights, seed=seed)
    whole = np.stack(mixed.place(np.arange(begin + n)))
    assert np.array_equal(np.stack(mixed.place(np.arange(begin, begin + n))), whole[:, begin:])
    one_by_one = [np.stack(mixed.place(np.array([g]))) for g in range(begin, begin + min(n, 20))]
    assert np.array_equal(np.concatenate(one_by_one, axis=1), whole[:, begin : begin + min(n, 20)])


@pytest.mark.parametrize("overfit", [0, 3])
def test_counts_are_those_of_the_steps(overfit: int) -> None:
    mixed = order([0.7, 0.2, 0.1], overfit_batches=overfit)
    seen = np.zeros(3, dtype=int)
    for step in range(80):
        assert mixed.counts(step).tolist() == seen.tolist(), f"after {step} steps"
        seen += np.bincount(mixed.place(mixed.indices(step))[0], minlength=3)


def test_far_away_is_as_near_and_as_exact() -> None:
    mixed = order([1 / 3, 2 / 3])
    begin = 10**12 // mixed.block * mixed.block
    source, which = mixed.place(np.arange(begin, begin + mixed.block))
    assert abs(int((source == 0).sum()) - mixed.block / 3) < 1
    assert which[source == 0].min() == mixed.before(begin)[0]


def test_every_epoch_of_a_source_has_each_of_its_rows_once_in_another_order() -> None:
    mixed = order([3, 1], sizes=[7, 50])
    rows = mixed.rows(np.arange(mixed.block))
    first = rows[rows < 7]
    source, which = mixed.place(np.arange(mixed.block))
    by_use = first[np.argsort(which[source == 0])]
    epochs = [tuple(by_use[i : i + 7]) for i in range(0, 7 * (len(by_use) // 7), 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > len(epochs) // 2


def test_within_a_block_sources_are_shuffled() -> None:
    source, _ = order([1, 1]).place(np.arange(256))
    runs = 1 + int((np.diff(source) != 0).sum())
    assert 90 < runs < 170, f"{runs} runs of one source in 256 samples"


# ---------------------------------------------------------------------------------------------------------------------- data


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for name, n in (("low", 60), ("up", 20)):
        found[name] = tmp_path / f"{name}.txt"
        letter = "a" if name == "low" else "A"
        found[name].write_text("".join(f"{letter * (1 + i % 9)} {letter}\n" for i in range(n)))
    return found


@pytest.fixture
def config(make_config, files):
    from txtrain.registry import TABLE

    text = TABLE["data"]["text"].config
    sources = {name: text(type="text", path=str(path), val_fraction=0.2) for name, path in files.items()}
    return lambda **data: make_config("mixture", {"sources": sources, "weights": {"low": 1, "up": 3}, **data})


def test_samples_come_from_the_source_that_the_order_says(config) -> None:
    module = DataModule(config())
    seen = np.zeros(2)
    for batch in itertools.islice(module.train_dataloader(), 64):
        source, _ = module.order.place(batch["sample_index"].numpy())
        upper = ((batch["input_ids"] == ord("A")).any(1)).long()
        assert torch.equal(upper, torch.from_numpy(source))
        seen += np.bincount(source, minlength=2)
    assert seen.tolist() == [64, 192]
    measured = module.measures(64)
    assert (measured["tokens/low"], measured["tokens/up"]) == (64 * 16, 192 * 16)
    assert measured["epochs/up"] == 192 / module.order.sizes[1]
    assert module.columns == ("val_loss/low", "val_loss/up", "tokens/low", "tokens/up", "epochs/low", "epochs/up")


def test_workers_give_the_same_batches_and_a_resume_goes_on(config) -> None:
    plain, workers = (list(itertools.islice(DataModule(config(num_workers=n)).train_dataloader(), 12)) for n in (0, 2))
    later = DataModule(config())
    later.start_step = 7
    for a, b in [*zip(plain, workers, strict=True), *zip(plain[7:], itertools.islice(later.train_dataloader(), 5), strict=True)]:
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert OrderHash(later.order)(12) == later.order_hash(12)


def test_each_source_is_validated_by_itself(config) -> None:
    module = DataModule(config())
    low, up = module.val_dataloader()
    assert module.val_names == ("low", "up")
    assert not any((batch["input_ids"] == ord("A")).any() for batch in low)
    assert not any((batch["input_ids"] == ord("a")).any() for batch in up)


def test_without_weights_sources_count_as_they_are_long(config) -> None:
    module = DataModule(config(weights=None))
    module.prepare()
    assert [float(s) for s in module.order.shares] == [n / module.n_train for n in module.order.sizes]


def test_one_tokenizer_is_trained_on_all(config) -> None:
    module = DataModule(config(tokenizer="train", seq_len=8))
    module.prepare()
    text = "aaa a\nAAA A\n"
    assert len(module.tokenizer.encode(text)) < len(text)


def test_what_is_wrong_with_a_source_names_it(make_config, tmp_path: Path) -> None:
    from txtrain.registry import TABLE

    text, memmap = TABLE["data"]["text"].config, TABLE["data"]["memmap"].config
    with pytest.raises(ConfigError, match=r"`data\.sources\.b\.path` must be an existing file"):
        DataModule(make_config("mixture", {"sources": {"b": text(type="text", path="/nowhere")}})).prepare()
    tokens = tmp_path / "t.bin"
    tokens.write_bytes(b"ab" * 500)
    with pytest.raises(ConfigError, match=r"`data\.tokenizer` must be given with a data=memmap"):
        DataModule(make_config("mixture", {"sources": {"b": memmap(type="memmap", path=str(tokens))}, "tokenizer": "train"})).prepare()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"sources": {}}, "`data.sources` must name at least one source"),
        ({"weights": {"low": 1.0}}, "`data.weights` must be of low, up, but is of low instead"),
        ({"weights": {"low": 1.0, "up": 0.0}}, "`data.weights.up` must be above 0, but is 0.0 instead"),
    ],
)
def test_mistakes_in_the_configuration(config, data, says) -> None:
    assert [p for p in config(**data).data.check() if p.startswith(says)], list(config(**data).data.check())


def test_shared_keys_are_the_mixtures(config) -> None:
    import dataclasses as dc

    mixture = config().data
    one = dc.replace(mixture.sources["low"], seq_len=8, val_fraction=2.0)
    mixture = dc.replace(mixture, sources={**mixture.sources, "low": one})
    problems = [*mixture.check(), *out_of_range(mixture, "data")]
    assert "`data.sources.low.seq_len` must not be given: it is one for all sources. Write data.seq_len=8." in problems
    assert any(p.startswith("`data.sources.low.val_fraction` must be above 0") for p in problems)


# -------------------------------------------------------------------------------------------------------- named validation


def test_validation_sets_have_names(make_config, files, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("b b b b b b\n" * 30)
    config = make_config("text", {"path": str(files["low"]), "val_path": {"up": str(files["up"]), "b": str(tmp_path / "other.txt")}})
    module = DataModule(config)
    up, other = module.val_dataloader()
    assert (module.val_names, module.columns) == (("up", "b"), ("val_loss/up", "val_loss/b"))
    assert all((batch["input_ids"] == ord("A")).any() for batch in up)
    assert all((batch["input_ids"] == ord("b")).any() for batch in other)
    assert module.prompts(1)[0].startswith("A")
    before = module.fingerprint
    files["up"].write_text("C C C\n" * 30)
    changed = DataModule(config)
    changed.prepare()
    assert changed.fingerprint != before


def test_a_named_set_may_not_hold_training_files(files) -> None:
    with pytest.raises(ConfigError, match=r"`data\.val_path` must not overlap data\.path"):
        TextFiles(str(files["low"]), {"a": str(files["up"]), "b": str(files["low"])})
    with pytest.raises(ConfigError, match=r"`data\.val_path\.a` must be an existing file"):
        TextFiles(str(files["low"]), {"a": "/nowhere"})

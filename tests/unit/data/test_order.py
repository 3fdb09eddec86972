import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from txtrain.data.samples.order import GlobalOrder, OrderHash, ShareSampler, permutation


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_each_epoch_is_a_bijection_on_the_rows(n: int, seed: int, epoch: int) -> None:
    rows = permutation(np.arange(n), n, seed, epoch)
    assert sorted(rows.tolist()) == list(range(n))


def test_positions_are_uniform_over_seeds() -> None:
    n, seeds = 10, 4000
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), permutation(np.arange(n), n, seed)] += 1
    expected = seeds / n
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 81 + 5 * np.sqrt(2 * 81), f"chi-squared {chi2:.0f} at 81 degrees of freedom"


def test_neighbours_are_torn_apart() -> None:
    rows = permutation(np.arange(100_000), 100_000, seed=1)
    near = np.mean(np.abs(np.diff(rows)) < 1000)
    assert 0.015 < near < 0.025, f"share of neighbours within 1 % is {near:.4f}; chance is 0.02"


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(permutation(np.arange(50), 50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_a_batch_across_epochs_takes_each_epochs_own_order() -> None:
    order = GlobalOrder(n=7, global_batch_size=5, seed=3)
    rows = np.concatenate([order.rows(order.indices(step)) for step in range(7)])
    for epoch in range(5):
        assert sorted(rows[7 * epoch : 7 * epoch + 7]) == list(range(7)), f"epoch {epoch}"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shares_of_all_ranks_are_the_global_step(world_size: int) -> None:
    order = GlobalOrder(n=100, global_batch_size=8, seed=0)
    shares = [list(itertools.islice(ShareSampler(order, rank, world_size, start_step=3), 4)) for rank in range(world_size)]
    for i in range(4):
        assert list(itertools.chain(*(share[i] for share in shares))) == order.indices(3 + i).tolist()


def test_sampler_started_later_continues_the_same_steps() -> None:
    order = GlobalOrder(n=100, global_batch_size=8, seed=0)
    whole = list(itertools.islice(ShareSampler(order), 10))
    assert list(itertools.islice(ShareSampler(order, start_step=6), 4)) == whole[6:]


def test_overfit_batches_cycles_over_the_first_steps() -> None:
    order, plain = GlobalOrder(n=100, global_batch_size=4, seed=0, overfit_batches=3), GlobalOrder(n=100, global_batch_size=4, seed=0)
    for step in range(9):
        assert order.indices(step).tolist() == plain.indices(step % 3).tolist()
    assert order.indices(2, 5).tolist() == np.concatenate([order.indices(s) for s in range(2, 7)]).tolist()


def test_order_hash_is_the_same_however_it_is_asked() -> None:
    order = GlobalOrder(n=1000, global_batch_size=16, seed=5)
    growing = OrderHash(order)
    one_by_one = [growing(step) for step in range(12)]
    assert one_by_one == [OrderHash(order)(step) for step in range(12)]
    assert growing(4) == one_by_one[4]  # backwards too
    assert len(set(one_by_one)) == 12
    assert OrderHash(GlobalOrder(n=1000, global_batch_size=16, seed=6))(3) != one_by_one[3]

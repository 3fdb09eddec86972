import pickle

import numpy as np

from txtrain.data.samples.length_order import BUCKET, LengthOrder

LENGTHS = np.random.default_rng(0).integers(1, 100, 1003)
SIZE = 16


def order(seed: int = 1) -> LengthOrder:
    return LengthOrder(len(LENGTHS), SIZE, seed, lengths=LENGTHS)


def epoch(made: LengthOrder, e: int) -> np.ndarray:
    n_batches = made.n // SIZE
    return made.rows(made.indices(e * n_batches, n_batches)).reshape(-1, SIZE)


def test_an_epoch_holds_every_sample_once_but_for_a_changing_remainder():
    left_out = []
    for e in range(3):
        rows = epoch(order(), e).ravel()
        assert len(set(rows.tolist())) == len(rows) == 1003 // SIZE * SIZE
        left_out.append(frozenset(range(1003)) - set(rows.tolist()))
    assert len(set(left_out)) == 3
    assert all(len(some) == 1003 % SIZE for some in left_out)


def test_a_batch_holds_samples_of_about_one_length():
    batches = -(-LENGTHS[epoch(order(), 0)] // BUCKET)
    assert (np.ptp(batches, axis=1) <= 1).all()
    padded = (LENGTHS[epoch(order(), 0)].max(axis=1, keepdims=True) * np.ones(SIZE)).sum()
    assert LENGTHS[epoch(order(), 0)].sum() / padded > 0.9
    assert abs(np.corrcoef(batches[:-1, 0], batches[1:, 0])[0, 1]) < 0.3, "batches do not stand by length"


def test_the_order_is_a_function_of_the_seed_and_the_index():
    whole = order().rows(np.arange(3000))
    assert np.array_equal(order().rows(np.arange(500, 2500)[::-1].copy()), whole[500:2500][::-1])
    assert np.array_equal(pickle.loads(pickle.dumps(order())).rows(np.arange(3000)), whole)
    assert not np.array_equal(order(2).rows(np.arange(3000)), whole)
    batches = {frozenset(b.tolist()) for b in epoch(order(), 0)}
    assert not batches & {frozenset(b.tolist()) for b in epoch(order(), 1)}, "other batches in the next epoch"


def test_the_first_steps_are_repeated_where_overfitting_is_asked_for():
    made = LengthOrder(len(LENGTHS), SIZE, 1, 2, lengths=LENGTHS)
    rows = made.rows(made.indices(0, 6)).reshape(3, -1)
    assert np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows[1], rows[2])

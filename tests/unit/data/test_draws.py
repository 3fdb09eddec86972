import numpy as np
import pytest

from txtrain.data.samples.draws import Draws

INDEX = np.arange(2000)


def test_a_draw_depends_on_its_sample_and_not_on_the_batch():
    together = Draws(7, "train", INDEX).uniform("mask", 5)
    some = np.array([3, 1999, 40, 3])
    assert np.array_equal(Draws(7, "train", some).uniform("mask", 5), together[some])
    assert np.array_equal(Draws(7, "train", INDEX).uniform("mask", 3), together[:, :3]), "fewer numbers are the first of more"


def test_seed_split_name_and_sample_all_matter():
    base = Draws(7, "train", INDEX).uniform("mask", 4)
    others = [Draws(8, "train", INDEX).uniform("mask", 4), Draws(7, "validation", INDEX).uniform("mask", 4), Draws(7, "train", INDEX).uniform("crop", 4)]
    for other in others:
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.05
    assert len(np.unique(base)) == base.size


def test_draws_are_uniform():
    u = Draws(0, "train", INDEX).uniform("mask", 50)
    assert 0 <= u.min() < u.max() < 1
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    expected = u.size / 20
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 43.8, chi2  # 19 degrees of freedom: 0.1 %
    assert abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1]) < 0.08
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.08, "neighbouring samples"


@pytest.mark.parametrize("below", [1, 2, 7])
def test_integers_reach_every_value_and_no_other(below):
    drawn = Draws(0, "train", INDEX).integer("n", below)
    assert set(drawn.tolist()) == set(range(below))


def test_integers_have_a_bound_for_each_sample():
    bounds = 1 + INDEX % 9
    drawn = Draws(0, "train", INDEX).integer("n", bounds)
    assert (drawn < bounds).all()
    assert (drawn >= 0).all()

import numpy as np
import pytest
from scipy import stats

from medrobust_lib.metrics import accuracy_interval
from medrobust_lib.studies.intervals import difference_interval, mcnemar_p, mean_interval, share_interval


def test_a_bootstrap_interval_is_near_the_normal_one_and_seeded():
    values = np.random.default_rng(1).normal(0.3, 2.0, 400)
    low, high = mean_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)
    assert mean_interval(values) == (low, high)
    assert mean_interval(values, seed=1) != (low, high)


def test_images_that_all_agree_bound_what_was_not_seen():
    unseen = accuracy_interval(0, 50)[1]
    assert mean_interval(np.zeros(50)) == pytest.approx((-unseen, unseen))
    assert mean_interval(np.zeros(50), largest=0.2) == pytest.approx((-0.2 * unseen, 0.2 * unseen))
    assert share_interval(np.ones(50)) == pytest.approx((1 - unseen, 1.0))
    with pytest.raises(ValueError, match=r"a vector of at least one value, got shape \(0,\)"):
        mean_interval([])


def test_a_paired_interval_is_narrower_than_one_from_two_cards():
    rng = np.random.default_rng(0)
    first = rng.random(200) < 0.6
    second = first ^ (rng.random(200) < 0.05)
    paired = mean_interval(second.astype(float) - first)
    cards = [(x.mean(), *accuracy_interval(int(x.sum()), 200)) for x in (first, second)]
    unpaired = difference_interval(*cards)
    assert unpaired[0] < paired[0] < second.mean() - first.mean() < paired[1] < unpaired[1]


def test_difference_of_shares_is_newcombes():
    # Newcombe 1998, table II: 56/70 minus 48/80 by Wilson's score intervals gives .0524 to .3339.
    wilson = [(k / n, *stats.binomtest(k, n).proportion_ci(method="wilson")) for k, n in ((48, 80), (56, 70))]
    assert difference_interval(*wilson) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_mcnemar_counts_only_images_that_differ():
    first = np.array([True] * 50 + [False] * 8 + [True] * 2)
    second = np.array([True] * 50 + [True] * 8 + [False] * 2)
    assert mcnemar_p(first, second) == pytest.approx(stats.binomtest(8, 10).pvalue)
    assert mcnemar_p(first[:50], second[:50]) == 1.0

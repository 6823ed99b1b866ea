import numpy as np
import pytest
from scipy import stats

from medrobust_lib.metrics import accuracy_interval
from medrobust_lib.metrics.classification import (
    difference_interval,
    mcnemar_p,
    mean_interval,
    paired_interval,
    share_interval,
)


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
    assert share_interval(np.full(50, 0.6)) == pytest.approx((0.6 - unseen, 0.6 + unseen))
    with pytest.raises(ValueError, match=r"a vector of at least one value, got shape \(0,\)"):
        mean_interval([])


@pytest.mark.parametrize("right", [0, 1, 11, 12])
def test_an_interval_of_right_and_wrong_answers_is_the_exact_one(right):
    assert share_interval(np.arange(12) < right) == accuracy_interval(right, 12)


def test_a_paired_interval_is_narrower_than_one_from_two_cards():
    rng = np.random.default_rng(0)
    first = rng.random(200) < 0.6
    second = first ^ (rng.random(200) < 0.05)
    paired = paired_interval(second.astype(int) - first)
    cards = [(x.mean(), *accuracy_interval(int(x.sum()), 200)) for x in (first, second)]
    unpaired = difference_interval(*cards)
    assert unpaired[0] < paired[0] < second.mean() - first.mean() < paired[1] < unpaired[1]


def of_counts(gained, lost, n):
    return paired_interval(np.repeat([1, -1, 0], [gained, lost, n - gained - lost]))


def coverage(difference, low, high, probability):
    """Probability of the outcomes whose interval holds the true difference."""
    return probability[(low - 1e-12 <= difference) & (difference <= high + 1e-12)].sum()


@pytest.mark.parametrize("n", [12, 24, 45, 90])
def test_paired_intervals_cover_by_exact_enumeration(n):
    # Every outcome (lost, gained) with its exact probability; those beyond the 1e-6 quantile count as not covered.
    most = int(stats.binom.isf(1e-6, n, 0.3))
    outcomes = np.array([(lost, gained) for lost in range(n + 1) for gained in range(min(n, most) + 1 - lost)])
    limits = np.array([of_counts(gained, lost, n) for lost, gained in outcomes])
    counts = np.column_stack([outcomes, n - outcomes.sum(1)])
    for differ in np.arange(0.02, 0.301, 0.02):
        for split in (0, 0.05, 0.1, 0.25, 0.4, 0.5):
            shares = differ * split, differ * (1 - split)
            probability = stats.multinomial.pmf(counts, n, [*shares, 1 - differ])
            assert coverage(shares[1] - shares[0], *limits.T, probability) >= 0.955, (differ, split)


@pytest.mark.parametrize(("n_a", "n_b"), [(12, 12), (24, 12), (45, 45)])
def test_unpaired_intervals_of_two_cards_cover_by_exact_enumeration(n_a, n_b):
    cards = [[(k / n, *accuracy_interval(k, n)) for k in range(n + 1)] for n in (n_a, n_b)]
    limits = np.array([[difference_interval(a, b) for b in cards[1]] for a in cards[0]])
    grid = np.arange(0.02, 0.99, 0.06)
    laws = [[stats.binom.pmf(np.arange(n + 1), n, p) for p in grid] for n in (n_a, n_b)]
    for a, law_a in zip(grid, laws[0], strict=True):
        for b, law_b in zip(grid, laws[1], strict=True):
            assert coverage(b - a, limits[..., 0], limits[..., 1], np.outer(law_a, law_b)) >= 0.94, (a, b)


def test_where_nothing_was_lost_the_upper_limit_is_that_of_one_share():
    low, high = of_counts(5, 0, 24)
    gained, none = accuracy_interval(5, 24), accuracy_interval(0, 24)
    assert high == pytest.approx(gained[1])
    assert low == pytest.approx(5 / 24 - np.hypot(5 / 24 - gained[0], none[1]))
    assert of_counts(0, 5, 24) == pytest.approx((-high, -low))
    # Each image differs: the limits of the share gained and those of the share lost move together.
    assert of_counts(4, 6, 10) == pytest.approx(tuple(2 * x - 1 for x in accuracy_interval(4, 10)))
    assert of_counts(0, 10, 10)[0] == -1


def test_difference_of_shares_is_newcombes():
    # Newcombe 1998, table II: 56/70 minus 48/80 by Wilson's score intervals gives .0524 to .3339.
    wilson = [(k / n, *stats.binomtest(k, n).proportion_ci(method="wilson")) for k, n in ((48, 80), (56, 70))]
    assert difference_interval(*wilson) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_difference_of_paired_shares_is_newcombes():
    # Newcombe 1998 (17:2635): 36 pairs have both, 12 the first and 2 the second alone, none neither; his
    # method 10, Wilson's intervals of 48/50 and 38/50 and their phi, gives .0569 to .3404.
    wilson = [(k / 50, *stats.binomtest(k, 50).proportion_ci(method="wilson")) for k in (38, 48)]
    phi = (36 * 0 - 12 * 2) / np.sqrt(48 * 2 * 38 * 12)
    assert difference_interval(*wilson, correlation=phi) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_mcnemar_counts_only_images_that_differ():
    assert mcnemar_p(8, 2) == pytest.approx(stats.binomtest(8, 10).pvalue)
    assert mcnemar_p(0, 0) == 1.0

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import binom, binomtest, expon, norm

from medrobust_lib.smoothing import bounds

ALPHA = 0.001


@pytest.mark.parametrize(
    ("k", "n", "bound", "quantile"),
    [
        (66, 100, 0.501650, None),
        (65, 100, 0.491376, None),
        (70, 100, 0.543444, 0.109114),
        (80, 100, 0.653557, 0.394942),
        (85, 100, 0.712507, 0.560723),
        (99, 100, 0.911373, 1.349259),
        (100, 100, 0.933254, 1.500475),
        (850, 1000, 0.812275, 0.886311),
        (1000, 1000, 0.993116, 2.463263),
        (8500, 10_000, 0.838681, 0.989053),
        (10_000, 10_000, 0.999309, 3.198578),
        (100_000, 100_000, 0.999931, 3.811457),
        (10, 10, 0.501187, None),
        (9, 9, 0.464159, None),
        (0, 100, 0.0, None),
    ],
)
def test_lower_bounds_and_radii_have_their_published_values(k, n, bound, quantile):
    value = bounds.lower_confidence_bound(k, n, ALPHA)
    assert value == pytest.approx(bound, abs=5e-7)
    if quantile is not None:
        assert bounds.certified_radius(value, 1.0) == pytest.approx(quantile, abs=5e-7)


@pytest.mark.parametrize(
    ("k", "n", "alpha", "bound"), [(85, 100, 0.0005, 0.702855), (100, 100, 0.0005, 0.926808), (85, 100, 0.05, 0.778463)]
)
def test_lower_bounds_at_other_alphas(k, n, alpha, bound):
    assert bounds.lower_confidence_bound(k, n, alpha) == pytest.approx(bound, abs=5e-7)


@pytest.mark.parametrize(("k", "n", "bound"), [(85, 100, 0.939514), (5, 50, 0.293314), (0, 100, 0.066746), (9, 9, 1.0)])
def test_upper_bounds(k, n, bound):
    assert bounds.upper_confidence_bound(k, n, ALPHA) == pytest.approx(bound, abs=5e-7)


def test_radii_at_sigma_one_half():
    p_lower = bounds.lower_confidence_bound(85, 100, ALPHA)
    assert bounds.certified_radius(p_lower, 0.5) == pytest.approx(0.280362, abs=5e-7)
    assert bounds.certified_radius(0.75, 0.5) == pytest.approx(0.337245, abs=5e-7)


@pytest.mark.parametrize(("sigma", "radius"), [(0.1, 0.3199), (0.25, 0.7996), (0.5, 1.5993), (1.0, 3.1986)])
def test_ten_thousand_draws_reach_at_most_3_1986_sigma(sigma, radius):
    assert bounds.maximum_radius(10_000, ALPHA, sigma) == pytest.approx(radius, abs=5e-5)


@pytest.mark.parametrize(("count", "n"), [(37, 50), (66, 100), (286, 500), (550, 1000), (5156, 10_000)])
def test_fewest_votes_that_do_not_abstain(count, n):
    assert bounds.minimum_count(n, ALPHA) == count
    assert bounds.lower_confidence_bound(count, n, ALPHA) > 0.5 > bounds.lower_confidence_bound(count - 1, n, ALPHA)


@pytest.mark.parametrize(
    ("ratio", "needed", "count"),
    [
        (0.1, 0.53983, 5553),
        (0.2, 0.57926, 5946),
        (0.25, 0.59871, 6139),
        (0.4, 0.65542, 6702),
        (0.5, 0.69146, 7058),
        (0.75, 0.77337, 7863),
        (1.0, 0.84134, 8526),
        (1.25, 0.89435, 9038),
        (1.5, 0.93319, 9409),
        (2.0, 0.97725, 9818),
        (2.5, 0.99379, 9962),
        (3.0, 0.99865, 9997),
        (3.1985, 0.99931, 10_000),
        (3.1986, 0.99931, 10_001),
        (4.0, 0.99997, 10_001),
        (15.0, 1.0, 10_001),
    ],
)
@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_votes_of_ten_thousand_needed_for_a_radius(ratio, needed, count, sigma):
    assert bounds.needed_probability(ratio * sigma, sigma) == pytest.approx(needed, abs=5e-6)
    assert bounds.minimum_count(10_000, ALPHA, radius=ratio * sigma, sigma=sigma) == count


@pytest.mark.parametrize("n", range(1, 10))
def test_fewer_than_ten_draws_never_certify_and_say_so(n):
    assert bounds.minimum_count(n, ALPHA) == n + 1
    with pytest.raises(ValueError, match=rf"n={n} draws can never certify at alpha=0.001: even {n} of {n} .* n >= 10"):
        bounds.check_draws(n, ALPHA)


def test_ten_draws_can_certify():
    bounds.check_draws(10, ALPHA)
    assert bounds.minimum_draws(ALPHA) == 10
    assert bounds.minimum_count(10, ALPHA) == 10


@pytest.mark.parametrize("alpha", [0.05, 0.001, 1e-6])
def test_lower_bound_agrees_with_scipy(alpha):
    rng = np.random.default_rng(0)
    for n in (1, 7, 100, 2500):
        for k in {0, n, *rng.integers(0, n + 1, 8).tolist()}:
            expected = binomtest(k, n, alternative="greater").proportion_ci(confidence_level=1 - alpha, method="exact")
            assert bounds.lower_confidence_bound(k, n, alpha) == pytest.approx(expected.low, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.05, 0.001, 1e-6])
def test_at_the_bounds_the_counts_are_exactly_as_unlikely_as_alpha(alpha):
    for n in (10, 100, 5000):
        k = np.arange(1, n + 1, max(1, n // 50))
        lower = bounds.lower_confidence_bound(k, n, alpha)
        np.testing.assert_allclose(binom.sf(k - 1, n, lower), alpha, rtol=1e-7)
        upper = bounds.upper_confidence_bound(k - 1, n, alpha)
        np.testing.assert_allclose(binom.cdf(k - 1, n, upper), alpha, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("n", [10, 57, 200, 1000])
def test_the_bounds_miss_the_truth_with_probability_at_most_alpha(n, alpha):
    k = np.arange(n + 1)
    lower = bounds.lower_confidence_bound(k, n, alpha)
    upper = bounds.upper_confidence_bound(k, n, alpha)
    # Just below a bound is where the miss rate peaks: there, the count of that bound has just become a miss.
    for p in np.concatenate([np.linspace(0.001, 0.999, 97), lower[1:][:: max(1, n // 40)] * (1 - 1e-12)]):
        mass = binom.pmf(k, n, p)
        assert mass[lower > p].sum() <= alpha * (1 + 1e-9)
        assert mass[upper < p].sum() <= alpha * (1 + 1e-9)


def test_the_bound_is_not_needlessly_loose():
    # The miss rate comes close to alpha just below each bound.
    lower = bounds.lower_confidence_bound(np.arange(101), 100, ALPHA)
    p = lower[80] * (1 - 1e-9)
    assert binom.pmf(np.arange(101), 100, p)[lower > p].sum() == pytest.approx(ALPHA, rel=1e-5)


def test_bounds_are_monotone():
    k = np.arange(301)
    lower = bounds.lower_confidence_bound(k, 300, ALPHA)
    upper = bounds.upper_confidence_bound(k, 300, ALPHA)
    assert np.all(np.diff(lower) > 0)
    assert np.all(np.diff(upper) > 0)
    assert np.all((lower < k / 300) | (k == 0))
    assert np.all((upper > k / 300) | (k == 300))
    # More draws at the same share and a larger alpha tighten the bound.
    assert np.all(np.diff(bounds.lower_confidence_bound(4 * np.arange(10, 200), 5 * np.arange(10, 200), ALPHA)) > 0)
    assert np.all(np.diff([bounds.lower_confidence_bound(85, 100, a) for a in (1e-6, 1e-3, 0.05, 0.2)]) > 0)


def test_bounds_mirror_each_other():
    k = np.arange(101)
    np.testing.assert_allclose(
        bounds.upper_confidence_bound(k, 100, ALPHA), 1 - bounds.lower_confidence_bound(100 - k, 100, ALPHA)
    )


def test_scalars_give_floats_and_arrays_broadcast():
    assert isinstance(bounds.lower_confidence_bound(5, 10, 0.05), float)
    assert isinstance(bounds.certified_radius(0.7, 1.0), float)
    assert isinstance(bounds.minimum_count(100, 0.05), int)
    table = bounds.lower_confidence_bound(np.array([[5], [9]]), np.array([10, 20, 30]), 0.05)
    assert table.shape == (2, 3)
    assert table[1, 2] == bounds.lower_confidence_bound(9, 30, 0.05)
    # Counts in a narrow type do not overflow.
    narrow = bounds.lower_confidence_bound(np.uint8(255), np.uint8(255), 0.05)
    assert narrow == bounds.lower_confidence_bound(255, 255, 0.05)


def test_nothing_is_certified_at_or_below_one_half():
    np.testing.assert_array_equal(bounds.certified_radius(np.array([0.0, 0.2, 0.5]), 0.25), 0.0)
    assert bounds.certified_radius(1.0, 0.25) == math.inf


def test_needed_probability_inverts_the_radius():
    radii = np.linspace(0, 1.5, 31)
    for sigma in (0.25, 0.5, 1.0):
        np.testing.assert_allclose(
            bounds.certified_radius(bounds.needed_probability(radii, sigma), sigma), radii, atol=1e-8
        )


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0, 2.0])
def test_minimum_count_inverts_the_bound_for_all_small_n(alpha, ratio):
    needed = norm.cdf(ratio)
    for n in range(1, 121):
        enough = np.flatnonzero(bounds.lower_confidence_bound(np.arange(n + 1), n, alpha) >= needed)
        expected = enough[0] if len(enough) else n + 1
        assert bounds.minimum_count(n, alpha, radius=ratio) == expected, n
    np.testing.assert_array_equal(
        bounds.minimum_count(np.arange(1, 121), alpha, radius=ratio),
        [bounds.minimum_count(n, alpha, radius=ratio) for n in range(1, 121)],
    )


@pytest.mark.parametrize("alpha", [0.05, 0.001, 1e-6, 2.0**-10, 0.5, 0.75])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 2.5])
def test_minimum_draws_is_the_shortest_unbroken_run(alpha, ratio):
    draws = bounds.minimum_draws(alpha, radius=ratio)
    assert bounds.minimum_count(draws, alpha, radius=ratio) == draws
    assert draws == 1 or bounds.minimum_count(draws - 1, alpha, radius=ratio) == draws


def test_minimum_draws_keeps_its_digits_far_out():
    # ln(1 / alpha) / (1 - p), for a p that double precision rounds to within 1e-16 of 1.
    assert bounds.minimum_draws(ALPHA, radius=8.0) == pytest.approx(math.log(1000) / norm.sf(8.0), rel=1e-12)


@pytest.mark.parametrize(
    ("low", "ideal", "means"),
    [
        (0.5, 0.7979, {100: 0.3879, 1000: 0.6500, 10_000: 0.7491}),
        (0.7, 1.159, {100: 0.6298, 1000: 0.9849, 10_000: 1.1028}),
        (0.9, 1.755, {100: 1.061, 1000: 1.5165, 10_000: 1.6764}),
    ],
)
def test_expected_radius_over_uniform_probabilities(low, ideal, means):
    # The substitution p = 1 - (1 - low) t^3 puts the nodes where the radius bends, near 1.
    nodes, weights = np.polynomial.legendre.leggauss(80)
    t, weights = (nodes + 1) / 2, weights / 2
    p, weights = 1 - (1 - low) * t**3, weights * 3 * t**2
    assert weights @ bounds.certified_radius(p, 1.0) == pytest.approx(ideal, abs=6e-4)
    for n, mean in means.items():
        assert weights @ bounds.expected_radius(p, n, ALPHA) == pytest.approx(mean, abs=6e-4 if mean == 1.061 else 6e-5)


@pytest.mark.parametrize(
    ("p", "ratio"), [(0.7, 0.314), (0.8, 0.571), (0.9, 0.687), (0.95, 0.714), (0.99, 0.688), (1.0, 0.609)]
)
def test_share_of_the_radius_that_100_of_1000_draws_keep(p, ratio):
    assert bounds.expected_radius(p, 100, ALPHA) / bounds.expected_radius(p, 1000, ALPHA) == pytest.approx(
        ratio, abs=6e-4
    )


def test_expected_radius_is_the_mean_over_all_counts():
    for p in (0.4, 0.6, 0.93):
        mean = sum(
            binom.pmf(k, 60, p) * bounds.certified_radius(bounds.lower_confidence_bound(k, 60, 0.01), 0.25)
            for k in range(61)
        )
        assert bounds.expected_radius(p, 60, 0.01, sigma=0.25) == pytest.approx(mean, rel=1e-12)


def test_expected_radius_is_zero_where_nothing_can_be_certified_and_the_maximum_at_one():
    assert bounds.expected_radius(0.99, 9, ALPHA) == 0.0
    np.testing.assert_array_equal(bounds.expected_radius(np.array([0.9, 1.0]), 9, ALPHA), [0.0, 0.0])
    assert bounds.expected_radius(1.0, 100, ALPHA, sigma=0.5) == pytest.approx(bounds.maximum_radius(100, ALPHA, 0.5))
    assert np.all(np.diff(bounds.expected_radius(np.linspace(0.3, 1, 40), 100, ALPHA)) > 0)


@pytest.mark.parametrize(
    ("p", "n", "probability", "digits"),
    [
        (0.55, 100, 0.017, 5e-4),
        (0.6, 100, 0.130, 5e-4),
        (0.65, 100, 0.462, 5e-4),
        (0.7, 100, 0.837, 5e-4),
        (0.75, 100, 0.984, 5e-4),
        (0.8, 100, 0.9997, 5e-5),
        (0.55, 1000, 0.513, 5e-4),
        (0.6, 1000, 0.9994, 5e-5),
    ],
)
def test_probability_of_not_abstaining(p, n, probability, digits):
    assert bounds.probability_of_radius(p, n, ALPHA, radius=0, sigma=0.5) == pytest.approx(probability, abs=digits)


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0, 2.0])
def test_at_the_needed_probability_a_radius_is_claimed_with_probability_at_most_alpha(ratio):
    p = bounds.needed_probability(ratio, 1.0)
    claimed = bounds.probability_of_radius(p, np.arange(1, 400), ALPHA, radius=ratio, sigma=1.0)
    assert claimed.max() <= ALPHA * (1 + 1e-9)
    assert claimed.max() > 0.5 * ALPHA


@pytest.mark.parametrize(
    ("n", "ratio"),
    [
        (50, 0.2833),
        (100, 0.4932),
        (200, 0.6416),
        (500, 0.7734),
        (1000, 0.8397),
        (5000, 0.9283),
        (10_000, 0.9493),
        (100_000, 0.9840),
        (25, 0.0),
        (1, 0.0),
    ],
)
def test_radius_ratio_rule(n, ratio):
    assert bounds.radius_ratio_rule(n, ALPHA) == pytest.approx(ratio, abs=5e-5)


def test_ratios_of_the_rule():
    hundred, thousand, ten_thousand = bounds.radius_ratio_rule(np.array([100, 1000, 10_000]), ALPHA)
    assert [hundred / thousand, hundred / ten_thousand, thousand / ten_thousand] == pytest.approx(
        [0.5873, 0.5195, 0.8846], abs=5e-5
    )


def test_the_constant_of_the_rule_depends_on_the_distribution():
    # To first order the loss is z / sqrt(n) times E[sqrt(p (1 - p)) / phi(radius)] / E[radius].
    def loss(p):
        return math.sqrt(p * (1 - p)) / norm.pdf(norm.ppf(p))

    constants = [quad(loss, low, 1)[0] / quad(norm.ppf, low, 1)[0] for low in (0.5, 0.7, 0.9)]
    assert constants == pytest.approx([2.0238, 1.5894, 1.4908], abs=2e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bounds.lower_confidence_bound(5, 4, ALPHA), "k=5 of n=4: counts need 0 <= k <= n and n >= 1"),
        (lambda: bounds.lower_confidence_bound(-1, 4, ALPHA), "k=-1 of n=4"),
        (lambda: bounds.lower_confidence_bound(0, 0, ALPHA), "k=0 of n=0"),
        (lambda: bounds.lower_confidence_bound(4.5, 10, ALPHA), "k=4.5: counts are integers, not float64"),
        (lambda: bounds.lower_confidence_bound(4, 10.0, ALPHA), "n=10.0: counts are integers, not float64"),
        (lambda: bounds.upper_confidence_bound(5, 4, ALPHA), "k=5 of n=4"),
        (lambda: bounds.lower_confidence_bound(4, 10, 0.0), "alpha=0.0: the failure probability of a certificate lies"),
        (lambda: bounds.lower_confidence_bound(4, 10, math.nan), "alpha=nan"),
        (lambda: bounds.minimum_count(100, 1.0), "alpha=1.0"),
        (lambda: bounds.minimum_count(-1, ALPHA), "k=0 of n=-1"),
        (lambda: bounds.minimum_count(10.7, ALPHA), "n=10.7: counts are integers"),
        (lambda: bounds.certified_radius(1.2, 0.5), "p_lower=1.2: a probability lies in"),
        (lambda: bounds.certified_radius(math.nan, 0.5), "p_lower=nan"),
        (lambda: bounds.certified_radius(0.7, 0.0), "sigma=0.0: smoothing needs noise"),
        (lambda: bounds.certified_radius(0.7, math.inf), "sigma=inf"),
        (
            lambda: bounds.certified_radius(0.7, 256),
            r"sigma=256: noise levels are in \[0, 1\] pixel units; .* \(1.004\)",
        ),
        (lambda: bounds.certified_radius(0.7, 0.5, p_upper=-0.1), "p_upper=-0.1: a probability lies in"),
        (lambda: bounds.certified_radius(0.7, 0.5, law="exp"), "unknown law 'exp'; choose one of normal, exponential"),
        (lambda: bounds.needed_probability(-0.1, 0.5), "radius=-0.1: certified radii are finite and >= 0"),
        (lambda: bounds.needed_probability(math.inf, 0.5), "radius=inf"),
        (lambda: bounds.minimum_draws(ALPHA, radius=1.5, sigma=0.1), "radius 1.5 at sigma 0.1 needs probability 1"),
        (lambda: bounds.expected_radius(1.2, 100, ALPHA), "p=1.2: a probability lies in"),
        (lambda: bounds.probability_of_radius(-0.1, 9, ALPHA, radius=0, sigma=1), "p=-0.1: a probability lies in"),
        (lambda: bounds.check_draws(0, ALPHA), "n=0 draws can never certify"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("low", "constant"), [(0.5, 2.0238), (0.6, 1.7641), (0.7, 1.5894), (0.8, 1.4859), (0.9, 1.4908)]
)
def test_ratio_constant_of_uniform_distributions(low, constant):
    p = low + (1 - low) * (np.arange(200_000) + 0.5) / 200_000
    assert bounds.ratio_constant(p) == pytest.approx(constant, abs=6e-4)


def test_ratio_constant_of_one_probability_is_the_published_pointwise_value():
    assert bounds.ratio_constant(0.8) == pytest.approx(1.698, abs=1e-3)
    with pytest.raises(ValueError, match=r"lie in \(0\.5, 1\)"):
        bounds.ratio_constant([0.4, 0.8])


def test_the_numbers_of_notebook_06s_first_exercise():
    composite = bounds.lower_confidence_bound(90, 100, 0.001)
    assert (round(composite, 3), round(bounds.certified_radius(composite, 0.5), 3)) == (0.775, 0.378)
    rate, q = bounds.upper_confidence_bound(10, 100, 0.0005), bounds.lower_confidence_bound(90, 100, 0.0005)
    assert (round(rate, 3), round(q, 3), round(q - rate, 3)) == (0.234, 0.766, 0.532)
    assert round(bounds.certified_radius(q - rate, 0.5), 3) == 0.041


# --- two bounds, and the exponential law


@pytest.mark.parametrize(
    ("law", "p_lower", "p_upper", "radius"),
    [
        ("normal", 0.5, norm.cdf(-1), 0.5),
        ("normal", norm.cdf(0.7), norm.cdf(-0.3), 0.5),
        ("normal", 0.4, 0.4, 0.0),
        ("normal", 0.3, 0.4, 0.0),
        ("normal", 0.0, 0.0, 0.0),
        ("normal", 1.0, 1.0, 0.0),
        ("normal", 1.0, 0.0, math.inf),
        ("exponential", 0.75, None, math.log(2)),
        ("exponential", 0.5, None, 0.0),
        ("exponential", 0.5, 0.25, -math.log(0.75)),
        ("exponential", 0.3, 0.4, 0.0),
        ("exponential", 1.0, None, math.inf),
    ],
)
def test_closed_forms_of_both_laws(law, p_lower, p_upper, radius):
    assert bounds.certified_radius(p_lower, 1.0, p_upper=p_upper, law=law) == pytest.approx(radius, abs=1e-12)
    found = bounds.certified_radius(p_lower, 20.0, p_upper=p_upper, law="exponential")
    assert law == "normal" or found == pytest.approx(20 * radius, abs=1e-12)


@pytest.mark.parametrize("law", ["normal", "exponential"])
def test_a_second_bound_of_1_minus_the_first_changes_nothing(law):
    p = np.linspace(0, 1, 101)[:-1]
    one = bounds.certified_radius(p, 0.5, law=law)
    np.testing.assert_allclose(bounds.certified_radius(p, 0.5, p_upper=1 - p, law=law), one, atol=1e-14)
    proved = p > 0.5
    np.testing.assert_allclose(bounds.needed_probability(one[proved], 0.5, law=law), p[proved])
    assert np.all(one[~proved] == 0)


@pytest.mark.parametrize("radius", [0.0, 0.1, 0.6, 1.5, 2.5])
@pytest.mark.parametrize("law", ["normal", "exponential"])
def test_fewest_votes_and_draws_of_both_laws(law, radius):
    wanted = {"radius": radius, "sigma": 0.5, "law": law}
    fewest = bounds.minimum_draws(ALPHA, **wanted)
    assert bounds.maximum_radius(fewest, ALPHA, 0.5, law=law) >= radius
    assert fewest == 1 or bounds.maximum_radius(fewest - 1, ALPHA, 0.5, law=law) <= radius
    n = 2 * fewest + 100
    k = bounds.minimum_count(n, ALPHA, **wanted)
    above, below = (
        bounds.certified_radius(bounds.lower_confidence_bound(v, n, ALPHA), 0.5, law=law) for v in (k, k - 1)
    )
    assert above >= radius >= below


def test_the_exponential_radius_is_the_shift_that_the_worst_classifier_survives():
    # f answers A up to an edge, the worst set of its mass: what a shift adds beyond the edge it takes from A.
    p, rate = 0.8, 1 / 0.5
    edge = expon.ppf(p, scale=1 / rate)
    radius = bounds.certified_radius(p, 1 / rate, law="exponential")
    share = expon.cdf(edge - np.array([0.0, radius - 1e-6, radius + 1e-6]), scale=1 / rate)
    assert share[0] == pytest.approx(p)
    assert share[1] > 0.5 > share[2]

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm

from medrobust_lib.smoothing import sequential
from medrobust_lib.smoothing.bounds import (
    certified_radius,
    lower_confidence_bound,
    maximum_radius,
    minimum_count,
    needed_probability,
)
from medrobust_lib.smoothing.sequential import (
    crossing_probability,
    operating_characteristics,
    price_of_radii,
    sequential_plan,
)

ALPHA, N = 0.001, 10_000
SIGMAS = (0.1, 0.25, 0.5, 1.0)
RADII = (0, 0.1, 0.25, 0.5, 0.75, 1, 1.25, 1.5)


def without_futility(plan):
    """Draw on to the end: then a claim has every chance of being made, so a false one too."""
    return replace(plan, hopeless=np.full_like(plan.hopeless, -1))


def worst_crossings(plan):
    return np.array(
        [crossing_probability(c, plan.looks, p)[-1] for c, p in zip(plan.success, plan.thresholds, strict=True)]
    )


def crossing_draw_by_draw(boundary, looks, p):
    """Crossing probability by adding single draws: slow, and shares no code with the library."""
    at, law, crossed = dict(zip(looks.tolist(), boundary.tolist(), strict=True)), np.ones(1), 0.0
    for draws in range(1, int(looks[-1]) + 1):
        law = np.append(law, 0.0) * (1 - p) + np.append(0.0, law) * p
        if draws in at:
            crossed += law[at[draws] :].sum()
            law[at[draws] :] = 0.0
    return crossed


def walks_of(plan, p, *, count, seed):
    """Successes of `count` simulated streams at each look."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.binomial(np.diff(plan.looks, prepend=0), p, size=(count, len(plan.looks))), axis=1)


# --- the guarantee, exactly


@pytest.mark.parametrize("n", [10, 50, 100, 1000, N])
@pytest.mark.parametrize("alpha", [0.05, ALPHA])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_every_boundary_is_crossed_with_probability_at_most_alpha(sigma, alpha, n):
    plan = sequential_plan(sigma=sigma, radii=RADII, n=n, alpha=alpha)
    crossed = worst_crossings(plan)
    assert np.all(crossed <= alpha)
    np.testing.assert_allclose(crossed, plan.error, rtol=1e-12)
    # With enough draws hardly any of alpha is wasted.
    assert n < 1000 or crossed.min() > 0.4 * alpha


@pytest.mark.parametrize("n", [50, 1000])
def test_the_exponential_law_has_the_same_guarantee_at_its_own_thresholds(n):
    plan = sequential_plan(sigma=20.0, radii=(0, 5, 10, 20, 40, 80), n=n, alpha=ALPHA, law="exponential")
    np.testing.assert_allclose(plan.thresholds, 1 - np.exp(-np.array(plan.radii) / 20) / 2)
    assert plan.radii[-1] == {50: 20, 1000: 80}[n] <= maximum_radius(n, ALPHA, 20.0, law="exponential")
    assert worst_crossings(plan).max() <= ALPHA
    look = len(plan.looks) - 1
    proof = plan.step(look, n, 0)
    assert (proof.radius, proof.p_lower) == (plan.radii[-1], plan.thresholds[-1])


def test_every_boundary_of_the_fine_grid_is_crossed_with_probability_at_most_alpha():
    plan = sequential_plan(sigma=0.5)
    assert len(plan.radii) == 64
    assert plan.error.max() <= ALPHA
    np.testing.assert_allclose(worst_crossings(plan)[::9], plan.error[::9], rtol=1e-12)
    assert np.all(np.diff(plan.success, axis=0) >= 0)


@pytest.mark.parametrize("alpha", [1e-6, 1e-12])
def test_small_alphas_are_kept_as_well(alpha):
    plan = sequential_plan(sigma=1, radii=RADII, n=1000, alpha=alpha)
    assert plan.error.max() <= alpha
    assert plan.error.min() > 0.3 * alpha


@pytest.mark.parametrize(("n", "alpha"), [(10, ALPHA), (60, 0.05), (400, ALPHA), (400, 0.05)])
def test_crossing_probability_agrees_with_adding_single_draws(n, alpha):
    plan = sequential_plan(sigma=1, radii=RADII, n=n, alpha=alpha)
    for j, threshold in enumerate(plan.thresholds):
        for p in (threshold, 0.5 * threshold, 0.5 + 0.5 * threshold, 0.0, 1.0):
            assert crossing_probability(plan.success[j], plan.looks, p)[-1] == pytest.approx(
                crossing_draw_by_draw(plan.success[j], plan.looks, p), rel=1e-9, abs=1e-17
            )
        assert crossing_draw_by_draw(plan.success[j], plan.looks, threshold) <= alpha


@pytest.mark.parametrize("p", [0.0, 0.3, 0.97, 1.0])
def test_crossing_at_one_look_is_a_binomial_tail(p):
    for count in (0, 1, 150, 200, 201):
        crossed = crossing_probability(np.array([count]), np.array([200]), p)
        assert crossed.shape == (1,)
        assert crossed[0] == pytest.approx(binom.sf(count - 1, 200, p), rel=1e-10, abs=1e-17)


def test_crossing_at_two_looks_is_the_sum_over_what_the_first_left():
    looks, boundary, p = np.array([5, 12]), np.array([5, 10]), 0.7
    late = sum(binom.pmf(k, 5, p) * binom.sf(9 - k, 7, p) for k in range(5))
    np.testing.assert_allclose(crossing_probability(boundary, looks, p), [p**5, p**5 + late], rtol=1e-12)


def test_crossing_is_more_likely_for_larger_probabilities_and_grows_with_the_looks():
    plan = sequential_plan(sigma=0.5, radii=RADII, n=1000)
    by_look = np.array([crossing_probability(plan.success[2], plan.looks, p) for p in np.linspace(0, 1, 41)])
    assert np.all(np.diff(by_look, axis=0) >= -1e-12)
    assert np.all(np.diff(by_look, axis=1) >= 0)


def false_claim(plan, p):
    """Exact probability that the whole plan ever claims a threshold that p does not exceed."""
    proved, _ = operating_characteristics(plan, p)
    false = np.flatnonzero(plan.thresholds >= p)
    return proved[false[0]] if len(false) else 0.0


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_whole_plan_makes_a_false_claim_with_probability_at_most_alpha_whatever_p(sigma):
    plan = without_futility(sequential_plan(sigma=sigma, radii=RADII))
    edges = np.concatenate([[0.0], plan.thresholds])
    between = [low + share * (high - low) for low, high in pairwise(edges) for share in (0.5, 0.98)]
    worst = [false_claim(plan, p) for p in plan.thresholds]
    assert max(worst) <= ALPHA
    assert min(worst) > 0.5 * ALPHA
    assert max(false_claim(plan, p) for p in between) <= ALPHA


@pytest.mark.parametrize(("n", "alpha"), [(80, 0.05), (150, ALPHA)])
@pytest.mark.parametrize("futility", [True, False])
def test_step_itself_makes_false_claims_with_probability_at_most_alpha(n, alpha, futility):
    # The joint law of count and claims, draw by draw, stopping exactly when `step` says so.
    plan = sequential_plan(sigma=1, radii=RADII, n=n, alpha=alpha)
    plan = plan if futility else without_futility(plan)
    decisions = [
        [[plan.step(look, k, proved)[:2] for k in range(draws + 1)] for proved in range(len(plan.radii) + 1)]
        for look, draws in enumerate(plan.looks)
    ]
    at = {int(draws): look for look, draws in enumerate(plan.looks)}
    grid = np.concatenate([plan.thresholds, (plan.thresholds[1:] + plan.thresholds[:-1]) / 2, [0.4, 0.49]])
    for p in grid:
        laws, claims, expected = {0: np.ones(1)}, np.zeros(len(plan.radii) + 1), 0.0
        for draws in range(1, n + 1):
            expected += sum(law.sum() for law in laws.values())
            laws = {j: np.append(law, 0.0) * (1 - p) + np.append(0.0, law) * p for j, law in laws.items()}
            if draws in at:
                going = {}
                for j, law in laws.items():
                    for k in np.flatnonzero(law):
                        proved, finished = decisions[at[draws]][j][k]
                        if finished:
                            claims[proved] += law[k]
                        else:
                            going.setdefault(proved, np.zeros(draws + 1))[k] += law[k]
                laws = going
        assert not laws
        at_least = np.cumsum(claims[::-1])[::-1][1:]
        assert claims.sum() == pytest.approx(1, rel=1e-10)
        assert at_least[plan.thresholds >= p].max(initial=0.0) <= alpha
        # The same numbers by blocks of draws.
        by_blocks, draws_by_blocks = operating_characteristics(plan, p)
        np.testing.assert_allclose(by_blocks, at_least, rtol=1e-9, atol=1e-15)
        assert draws_by_blocks == pytest.approx(expected, rel=1e-10)


def test_an_adversary_who_chooses_when_to_stop_gains_nothing():
    # Backward induction: at each look the adversary, who knows p, keeps the false claim if there is one and else
    # stops or goes on, whichever makes a false claim likelier.
    plan = sequential_plan(sigma=1, radii=RADII, n=300)
    for j, p in enumerate(plan.thresholds):
        value = np.zeros(301)
        for look in reversed(range(len(plan.looks))):
            draws = int(plan.looks[look])
            before = int(plan.looks[look - 1]) if look else 0
            value = np.where(np.arange(draws + 1) >= plan.success[j, look], 1.0, value)
            block = binom.pmf(np.arange(draws - before + 1), draws - before, p)
            going_on = np.array([block @ value[k : k + len(block)] for k in range(before + 1)])
            value = np.maximum(0.0, going_on)
        assert value[0] <= ALPHA
        assert value[0] == pytest.approx(plan.error[j], rel=1e-9)


def test_no_stopping_rule_makes_a_false_claim_likelier():
    plan = sequential_plan(sigma=0.5, radii=RADII, n=1000, alpha=0.05)
    to_the_end, rng = without_futility(plan), np.random.default_rng(3)
    arbitrary = [rng.integers(-1, plan.looks + 1, size=plan.hopeless.shape) for _ in range(6)]
    # Stopping whenever the share of successes is above, or near, what the next radius needs.
    tempting = [
        np.where(np.arange(len(plan.looks)) >= first, np.ceil(plan.thresholds[:, None] * plan.looks), -1).astype(int)
        for first in (0, 5, 15)
    ]
    for p in (*plan.thresholds, 0.5 * (plan.thresholds[1] + plan.thresholds[2])):
        limit = operating_characteristics(to_the_end, p)[0]
        for hopeless in (plan.hopeless, *arbitrary, *tempting):
            assert np.all(operating_characteristics(replace(plan, hopeless=hopeless), p)[0] <= limit + 1e-12)


def test_leaving_out_looks_makes_a_crossing_less_likely():
    plan, rng = sequential_plan(sigma=1, radii=RADII, n=1000), np.random.default_rng(4)
    for j, p in enumerate(plan.thresholds):
        kept = rng.random(len(plan.looks)) < 0.5
        kept[-1] = True
        assert crossing_probability(plan.success[j, kept], plan.looks[kept], p)[-1] <= plan.error[j] * (1 + 1e-12)


def test_boundaries_rise_with_the_threshold_so_that_claims_are_nested():
    for sigma in SIGMAS:
        plan = sequential_plan(sigma=sigma, radii=RADII)
        assert np.all(np.diff(plan.success, axis=0) >= 0)
        for look in range(len(plan.looks)):
            for k in np.unique(np.clip(plan.success[:, look] + np.array([[-1], [0], [1]]), 0, plan.looks[look])):
                crossed = k >= plan.success[:, look]
                assert np.all(np.diff(crossed.astype(int)) <= 0)
                assert plan.step(look, int(k), 0)[0] == crossed.sum()


def test_raising_boundaries_to_be_nested_only_lowers_crossings():
    # The boundary that a threshold would have on its own, at the same looks, is never above the nested one.
    for sigma in SIGMAS:
        plan = sequential_plan(sigma=sigma, radii=RADII)
        for j, p in enumerate(plan.thresholds):
            first = math.ceil(math.log(ALPHA * sequential._EARLY_SHARE * sequential._FIRST_SHARE) / math.log(p))
            alone = sequential._boundary(p, plan.looks, first, ALPHA)
            assert np.all(alone <= plan.success[j])


def test_the_last_look_keeps_half_of_alpha():
    # So that a full run of draws certifies almost what a fixed sample does.
    plan = sequential_plan(sigma=1, radii=RADII)
    last = [minimum_count(N, ALPHA / 2, radius=r, sigma=1) for r in plan.radii]
    assert np.all(plan.success[:, -1] <= np.array(last) + 1)
    assert np.all(plan.success[:, -1] >= [minimum_count(N, ALPHA, radius=r, sigma=1) for r in plan.radii])


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0, 2.0])
def test_testing_a_clopper_pearson_bound_again_and_again_breaks_its_alpha(ratio):
    # What the boundaries are for. One bound at n = 10,000 keeps alpha; the same bound every 100 draws does not.
    looks = np.arange(100, N + 1, 100)
    p = needed_probability(ratio, 1.0)
    naive = np.array([minimum_count(int(n), ALPHA, radius=ratio) for n in looks])
    crossed = crossing_probability(naive, looks, p)
    assert binom.sf(naive[-1] - 1, N, p) <= ALPHA
    assert crossed[-1] > 9 * ALPHA
    if ratio < 2:
        assert crossed[-1] > 10 * ALPHA
        assert crossed[-1] == pytest.approx(0.0123, abs=1e-4)
    else:
        assert crossed[-1] == pytest.approx(0.0094, abs=1e-4)


# --- agreement with simulation


@pytest.mark.parametrize(("sigma", "p"), [(0.25, 0.9), (0.5, 0.82), (1.0, 0.52), (0.5, 0.1), (1.0, 0.9995)])
def test_operating_characteristics_agree_with_simulated_streams(sigma, p):
    plan, count = sequential_plan(sigma=sigma, radii=RADII), 1500
    walks = walks_of(plan, p, count=count, seed=5)
    proved, draws = np.zeros(count, dtype=int), np.zeros(count)
    for walk in range(count):
        for look in range(len(plan.looks)):
            proved[walk], finished, *_ = plan.step(look, walks[walk, look], proved[walk])
            if finished:
                draws[walk] = plan.looks[look]
                break
    exact, expected = operating_characteristics(plan, p)
    shares = (proved[:, None] > np.arange(len(plan.radii))).mean(axis=0)
    assert np.all(np.abs(shares - exact) <= 4.5 * np.sqrt(exact * (1 - exact) / count) + 1e-9)
    assert abs(draws.mean() - expected) <= 4.5 * draws.std() / math.sqrt(count) + 1e-9


def test_simulated_false_claims_stay_within_alpha():
    plan = sequential_plan(sigma=1, radii=RADII, n=1000, alpha=0.05)
    count = 40_000
    for j in (0, 3, 6):
        walks = walks_of(plan, plan.thresholds[j], count=count, seed=j)
        share = np.mean(np.any(walks >= plan.success[j], axis=1))
        assert abs(share - plan.error[j]) <= 4.5 * math.sqrt(0.05 * 0.95 / count)


def test_futility_stops_cost_little_power_and_no_error():
    # The predictive probability given up at a stop is 1 %; over all looks a few points at the worst p.
    plan = sequential_plan(sigma=0.5, radii=RADII)
    for p in (0.3, 0.52, 0.6, 0.75, 0.9, 0.97):
        proved, draws = operating_characteristics(plan, p)
        limit, longest = operating_characteristics(without_futility(plan), p)
        assert np.all(proved <= limit + 1e-12)
        assert np.all(proved >= limit - 0.06)
        assert draws <= longest


# --- two bounds


LAWS = {"normal": 0.25, "exponential": 20.0}


def two_bounds(law="normal", *, k=40, rival=10, n=1000, alpha=ALPHA, levels=(0, 0.1, 0.25, 0.5, 1)):
    sigma = LAWS[law]
    return sequential_plan(sigma=sigma, radii=[x * sigma for x in levels], n=n, alpha=alpha, law=law).chosen(
        k, rival, 100
    )


@pytest.mark.parametrize("law", LAWS)
def test_both_thresholds_of_a_radius_prove_it_and_no_more(law):
    plan = two_bounds(law)
    assert (plan.bounds, plan.center < 0, plan.rival.center) == ("two", True, -plan.center)
    a, b = plan.thresholds, 1 - plan.rival.thresholds
    assert np.all(np.diff(a) > 0)
    assert np.all(np.diff(b) < 0)
    assert a[0] == pytest.approx(b[0])
    np.testing.assert_allclose(certified_radius(a[1:], plan.sigma, p_upper=b[1:], law=law), plan.radii[1:])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("alpha", [0.05, ALPHA])
def test_each_of_the_two_boundaries_has_half_of_alpha(law, alpha):
    plan = two_bounds(law, alpha=alpha)
    for side in (plan, plan.rival):
        crossed = worst_crossings(side)
        assert 0.2 * alpha < crossed.max() <= alpha / 2
        assert np.all(np.diff(side.success, axis=0) >= 0)
        np.testing.assert_array_equal(side.looks, plan.looks)


def test_a_center_of_zero_is_the_one_bound_with_the_whole_of_alpha():
    plan = sequential_plan(sigma=0.25, radii=RADII, n=1000)
    assert plan.chosen(70, 30, 100) is plan
    assert plan.chosen(100, 0, 100) is plan
    assert (plan.bounds, plan.center) == ("one", 0.0)
    assert plan.chosen(80, 3, 100).bounds == "two"
    assert sequential_plan(sigma=0.25, radii=[0], n=1000).chosen(80, 3, 100).bounds == "one", "no radius to gain"


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("true", ["level", "behind", "far"])
def test_nine_classes_at_the_worst_case_are_claimed_falsely_no_more_often_than_alpha(law, true):
    """Without futility stops; false are claims about class 0 whose thresholds it, or a rival, does not meet."""
    alpha, n, trials = 0.05, 300, 1500
    shares = {"k": 11, "rival": 11} if true == "level" else {"k": 45, "rival": 10}
    plan = two_bounds(law, **shares, n=n, alpha=alpha, levels=(0, 0.05, 0.1, 0.2, 0.4))
    plan = replace(without_futility(plan), rival=without_futility(plan.rival))
    a, b = plan.thresholds, 1 - plan.rival.thresholds
    p = {
        "level": np.full(9, 1 / 9),  # the center is there
        "behind": np.array([0.9 - b[2], b[2], *[0.1 / 7] * 7]),  # one rival just at the third radius
        "far": np.array([a[2], *[(1 - a[2]) / 8] * 8]),  # class 0 just at the third radius, no rival near it
    }[true]
    wrong_from = int(np.argmax((p[0] <= a + 1e-12) | (p[1:].max() >= b - 1e-12))) + 1
    rng = np.random.default_rng(11)
    walks = np.cumsum(
        rng.multinomial(np.diff(plan.looks, prepend=0)[:, None], p, size=(len(plan.looks), trials)), axis=0
    )
    wrong = 0
    for trial in range(trials):
        proved = 0
        for look, (k, *others) in enumerate(walks[:, trial].tolist()):
            proved, finished, *_ = plan.step(look, k, proved, max(others))
            if finished:
                break
        wrong += proved >= wrong_from
    assert binomtest(wrong, trials, alpha, alternative="greater").pvalue > 0.01
    assert true == "level" or wrong > 0


def test_a_hopeless_rival_stops_as_a_hopeless_class_does():
    plan = two_bounds()
    look = len(plan.looks) // 2
    draws = int(plan.looks[look])
    k = draws // 2
    assert not plan.step(look, k, 0, 0).finished or plan.step(look, k, 0, 0).proved == len(plan.radii)
    stopped = plan.step(look, k, 0, draws - k)
    assert (stopped.proved, stopped.finished) == (0, True)


# --- the plan as an object


def test_a_count_that_is_hopeless_stops_without_proving_anything():
    plan = sequential_plan(sigma=0.5, radii=RADII)
    look = 5
    hopeless = int(plan.hopeless[0, look])
    assert 0 <= hopeless < plan.looks[look] / 2
    assert plan.step(look, hopeless, 0) == (0, True, 0.0, 0.0, 1.0)
    assert plan.step(look, hopeless + 1, 0) == (0, False, 0.0, 0.0, 1.0)


def test_the_last_look_finishes_whatever_the_count():
    plan = sequential_plan(sigma=0.5, radii=RADII, n=200)
    last = len(plan.looks) - 1
    assert plan.looks[last] == 200
    for k in range(201):
        proved, finished, *_ = plan.step(last, k, 0)
        assert finished
        assert proved == (k >= plan.success[:, last]).sum()


def test_proving_the_largest_radius_finishes():
    plan = sequential_plan(sigma=1, radii=[0.25])
    look = int(np.flatnonzero(plan.success[-1] <= plan.looks)[0])
    k = int(plan.success[-1, look])
    assert plan.step(look, k, 0) == (2, True, 0.25, pytest.approx(norm.cdf(0.25)), pytest.approx(norm.cdf(-0.25)))
    assert plan.step(look, k - 1, 0)[0] < 2


def test_what_is_proved_stays_proved():
    plan = sequential_plan(sigma=0.5, radii=RADII, n=1000)
    for walk in walks_of(plan, 0.85, count=300, seed=6):
        proved = 0
        for look, k in enumerate(walk):
            now, finished, *_ = plan.step(look, int(k), proved)
            assert now >= proved
            proved = now
            if finished:
                break
        else:
            pytest.fail("the last look did not finish")
    assert plan.step(len(plan.looks) - 1, 0, 3)[:2] == (3, True)


def test_a_stop_is_never_hopeless_for_a_radius_that_is_within_reach():
    for plan in (sequential_plan(sigma=0.5, radii=RADII), sequential_plan(sigma=1, radii=RADII, n=100)):
        # A count that already meets the goal of the last look is never given up, nor is the last look itself.
        assert np.all(plan.hopeless < plan.success[:, -1:])
        np.testing.assert_array_equal(plan.hopeless[:, -1], -1)
        assert np.all(np.diff(plan.hopeless[:, :-1], axis=0) >= 0)


def test_futility_is_the_predictive_probability_it_claims_to_be():
    # Beta-binomial successes still to come under Jeffreys' prior, by summation.
    plan = sequential_plan(sigma=1, radii=[0.5], n=400)
    for look in (4, 8, 12):
        draws = int(plan.looks[look])
        rest, k = 400 - draws, int(plan.hopeless[0, look])
        p = (np.arange(200_000) + 0.5) / 200_000

        def predictive(k, draws=draws, rest=rest, p=p):
            posterior = np.exp((k - 0.5) * np.log(p) + (draws - k - 0.5) * np.log1p(-p))
            return np.average(binom.sf(plan.success[0, -1] - k - 1, rest, p[::100]), weights=posterior[::100])

        assert predictive(k) < 2 * sequential.FUTILITY
        assert predictive(k + 2) > 0.5 * sequential.FUTILITY


def test_tables_are_built_once_and_cannot_be_written_to():
    first, again = sequential_plan(sigma=0.5, radii=RADII), sequential_plan(sigma=0.5, radii=list(RADII))
    assert first.success is again.success
    for name in ("looks", "success", "hopeless", "error"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        with pytest.raises(ValueError, match="read-only"):
            getattr(first, name)[..., 0] = 0
    fresh = sequential._tables.__wrapped__(tuple(r / 0.5 for r in first.radii), N, ALPHA)
    for cached, built in zip((first.looks, first.success, first.hopeless, first.error), fresh, strict=True):
        np.testing.assert_array_equal(cached, built)


def test_only_the_radius_in_units_of_sigma_matters():
    plan = sequential_plan(sigma=0.25, radii=RADII)
    for factor in (0.5, 2, 4, 1.7):
        scaled = sequential_plan(sigma=0.25 * factor, radii=[factor * r for r in RADII])
        np.testing.assert_allclose(scaled.radii, factor * np.array(plan.radii))
        np.testing.assert_array_equal(scaled.looks, plan.looks)
        np.testing.assert_array_equal(scaled.success, plan.success)
        np.testing.assert_array_equal(scaled.hopeless, plan.hopeless)


def test_all_noise_levels_share_the_table_of_the_fine_grid():
    assert sequential_plan(sigma=0.1).success is sequential_plan(sigma=1.0).success
    plan = sequential_plan(sigma=0.1)
    np.testing.assert_allclose(np.diff(plan.radii), 0.1 * sequential.GRID_STEP)
    assert plan.radii[0] == 0
    assert plan.radii[-1] <= maximum_radius(N, ALPHA, 0.1) < plan.radii[-1] + 0.1 * sequential.GRID_STEP


@pytest.mark.parametrize(
    ("sigma", "n", "kept"),
    [
        (0.1, N, (0, 0.1, 0.25)),
        (0.25, N, (0, 0.1, 0.25, 0.5, 0.75)),
        (0.5, N, RADII),
        (1.0, 100, RADII),
        (0.5, 100, (0, 0.1, 0.25, 0.5, 0.75)),
        (0.25, 10, (0,)),
    ],
)
def test_radii_that_n_draws_cannot_certify_are_left_out(sigma, n, kept):
    plan = sequential_plan(sigma=sigma, radii=RADII, n=n)
    assert plan.radii == kept
    assert plan.success.shape == plan.hopeless.shape == (len(kept), len(plan.looks))
    # Those that are kept can indeed be certified: an unbroken run of successes proves them all.
    assert plan.step(len(plan.looks) - 1, n, 0)[:2] == (len(kept), True)


def test_radius_zero_is_always_asked_and_radii_are_sorted_without_repetition():
    assert sequential_plan(sigma=0.5, radii=[1, 0.25, 0.25]).radii == (0.0, 0.25, 1.0)
    assert sequential_plan(sigma=0.5, radii=[]).radii == (0.0,)


@pytest.mark.parametrize("n", [10, 11, 12, 37, 1000, N])
def test_looks_increase_and_end_at_n(n):
    plan = sequential_plan(sigma=1, radii=RADII, n=n)
    assert plan.looks[-1] == n
    assert np.all(np.diff(plan.looks) > 0)
    assert len(plan.looks) < 60


def test_the_bound_of_a_fixed_sample_is_never_beaten_at_the_same_count():
    # Sequential sampling pays for its looks: whatever it proves, one Clopper-Pearson bound at that count proves too.
    for sigma in (0.25, 1.0):
        plan = sequential_plan(sigma=sigma, radii=RADII)
        for look, draws in enumerate(plan.looks):
            within = plan.success[:, look] <= draws
            bound = lower_confidence_bound(plan.success[within, look], int(draws), ALPHA)
            assert np.all(bound >= plan.thresholds[within])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sequential_plan(sigma=0), "sigma=0: smoothing needs noise"),
        (lambda: sequential_plan(sigma=0.5, alpha=1), "alpha=1: the failure probability"),
        (lambda: sequential_plan(sigma=0.5, n=9), "n=9 draws can never certify at alpha=0.001: even 9 of 9 .* n >= 10"),
        (lambda: sequential_plan(sigma=0.5, radii=[0.1, -0.2]), r"radius=\[ 0.1 -0.2\]: certified radii are finite"),
        (lambda: sequential_plan(sigma=0.5, radii=[math.inf]), r"radius=\[inf\]: certified radii are finite"),
        (lambda: sequential_plan(sigma=0.5, radii=[math.nan]), r"radius=\[nan\]: certified radii are finite"),
        (lambda: crossing_probability(np.array([3]), np.array([5]), 1.2), "p=1.2: a probability lies in"),
        (lambda: price_of_radii([0.1], sigma=0.5, p=-0.1), "p=-0.1: a probability lies in"),
        (lambda: price_of_radii([-0.1], sigma=0.5), "certified radii are finite and >= 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

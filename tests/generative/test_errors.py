import contextlib
import itertools

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from medrobust_lib.generative.errors import (
    ErrorRate,
    FalsePositives,
    InconsistentErrorRateError,
    SymmetricErrors,
    TotalErrors,
    check_error_model,
    split_alpha,
)
from medrobust_lib.smoothing.bounds import certified_radius, lower_confidence_bound

LABEL = "harmless"
SIGMA = 0.5
RATES = (0.01, 0.05, 0.1, 0.15, 0.2)
GRID = np.linspace(0.05, 0.95, 19)

# What 85 of 100 votes at alpha 0.001 prove about the true label: bound and radius at sigma 0.5, per error rate.
PROVED = {
    0.0: ((0.712507, 0.2804), (0.712507, 0.2804), (0.712507, 0.2804)),
    0.01: ((0.716844, 0.2867), (0.709603, 0.2761), (0.702507, 0.2658)),
    0.05: ((0.736119, 0.3157), (0.697376, 0.2584), (0.662507, 0.2097)),
    0.10: ((0.765634, 0.3623), (0.680563, 0.2346), (0.612507, 0.1429)),
    0.15: ((0.803581, 0.4272), (0.661773, 0.2087), (0.562507, 0.0787)),
    0.20: ((0.854178, 0.5273), (0.640634, 0.1801), (0.512507, 0.0157)),
}


def pairs(first, second):
    return list(itertools.product(first, second))


def symmetric(rate, **options):
    return SymmetricErrors(ErrorRate(rate), **options)


def one_sided(rate):
    return FalsePositives({LABEL: ErrorRate(rate)})


def total(rate):
    return TotalErrors(ErrorRate(rate))


def corrected(model, q_lower, alpha=0.001):
    return model.corrected(q_lower, label=LABEL, alpha=alpha)


def votes_for_label(p, *, missed=0.0, false_positives=0.0):
    """P[the oracle says "harmless"] for texts of which the share p is."""
    return p * (1 - missed) + (1 - p) * false_positives


# Known rates


@pytest.mark.parametrize("rate", PROVED)
def test_what_85_of_100_votes_prove_under_each_error_model(rate):
    q_lower = lower_confidence_bound(85, 100, 0.001)
    for model, (bound, radius) in zip((symmetric(rate), one_sided(rate), total(rate)), PROVED[rate], strict=True):
        found = corrected(model, q_lower)
        assert found == pytest.approx(bound, abs=6e-7)
        assert certified_radius(found, SIGMA) == pytest.approx(radius, abs=6e-5)


@pytest.mark.parametrize(
    ("q", "rate", "p"),
    [
        *[(0.7, 0.05, 0.722222), (0.7, 0.1, 0.75), (0.7, 0.2, 0.833333)],
        *[(0.8, 0.05, 0.833333), (0.8, 0.1, 0.875), (0.8, 0.2, 1.0)],
        *[(0.77, 0.05, 0.8), (0.74, 0.1, 0.8), (0.68, 0.2, 0.8)],
        *[(0.86, 0.05, 0.9), (0.82, 0.1, 0.9), (0.74, 0.2, 0.9)],
    ],
)
def test_theorem_4_1(q, rate, p):
    assert corrected(symmetric(rate), q) == pytest.approx(p, abs=1e-6)
    assert corrected(symmetric(rate), q) <= 1
    assert rate + p * (1 - 2 * rate) == pytest.approx(q, abs=1e-6)


@pytest.mark.parametrize(("n_labels", "rate"), pairs([2, 3, 5, 10], [0.0, 0.02, 0.2, 0.45]))
def test_symmetric_errors_among_many_labels_are_inverted(n_labels, rate):
    for p in GRID:
        q = votes_for_label(p, missed=rate, false_positives=rate / (n_labels - 1))
        assert corrected(symmetric(rate, n_labels=n_labels), q) == pytest.approx(p, abs=1e-12)


@pytest.mark.parametrize("q", [0.55, 0.62, 0.7, 0.79])
def test_the_symmetric_bound_grows_with_the_rate_and_the_others_fall(q):
    for make, sign in ((symmetric, 1), (one_sided, -1), (total, -1)):
        bounds = np.array([corrected(make(rate), q) for rate in (0.0, *RATES)])
        assert bounds[0] == q
        assert (sign * np.diff(bounds) > 0).all()


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("make", [symmetric, one_sided, total])
def test_every_bound_grows_with_the_votes_and_stays_a_probability(make, rate):
    votes = np.linspace(0, 1 - rate, 50)
    bounds = np.array([corrected(make(rate), q) for q in votes])
    assert (np.diff(bounds) >= 0).all()
    assert np.diff(bounds)[-1] > 0
    assert bounds.min() == 0
    assert bounds.max() <= 1


def test_a_rate_that_leaves_nothing():
    assert corrected(one_sided(1.0), 0.9) == corrected(total(1.0), 0.9) == 0


# What each assumption is worth where it fails


@pytest.mark.parametrize(("p", "rate", "q", "errors"), [(0.4, 0.3, 0.58, 0.18), (0.45, 0.2, 0.56, 0.11)])
def test_theorem_4_2_certifies_a_falsehood_where_errors_are_not_symmetric(p, rate, q, errors):
    """Most texts are harmful, the oracle errs on less than half of them, and yet most are called harmless."""
    assert votes_for_label(p, false_positives=rate) == pytest.approx(q)
    assert (1 - p) * rate == pytest.approx(errors)
    assert p < 0.5 < corrected(SymmetricErrors(), q) == q
    assert corrected(one_sided(rate), q) == pytest.approx(p)
    assert corrected(total(errors), q) == pytest.approx(p)


@pytest.mark.parametrize(("missed", "false_positives"), pairs([0.0, 0.1, 0.4, 0.9], [0.0, 0.1, 0.4, 0.9]))
def test_one_sided_and_total_errors_never_promise_too_much(missed, false_positives):
    for p in GRID:
        q = votes_for_label(p, missed=missed, false_positives=false_positives)
        assert corrected(one_sided(false_positives), q) <= p + 1e-12
        assert corrected(total(p * missed + (1 - p) * false_positives), q) <= p + 1e-12


def test_over_estimating_a_symmetric_rate_is_unsound_and_under_estimating_is_not():
    q = votes_for_label(0.6, missed=0.05, false_positives=0.05)
    assert q == pytest.approx(0.59)
    assert corrected(symmetric(0.05), q) == pytest.approx(0.6)
    assert corrected(symmetric(0.2), q) == pytest.approx(0.65)
    assert corrected(symmetric(0.01), q) < 0.6
    assert corrected(SymmetricErrors(), q) == q < 0.6


@pytest.mark.parametrize(("n_labels", "assumed"), pairs([2, 3, 8], [None, 0.0, 0.05, 0.2]))
def test_a_symmetric_rate_that_is_too_small_or_unknown_is_safe_for_a_majority(n_labels, assumed):
    model = SymmetricErrors(None if assumed is None else ErrorRate(assumed), n_labels=n_labels)
    shares = {p: votes_for_label(p, missed=0.25, false_positives=0.25 / (n_labels - 1)) for p in GRID}
    majorities = {p: q for p, q in shares.items() if q > 1 / n_labels}
    assert majorities
    for p, q in majorities.items():
        assert corrected(model, q) <= p + 1e-12


@pytest.mark.parametrize("model", [SymmetricErrors(), SymmetricErrors(ErrorRate(errors=2, trials=100))])
def test_below_an_even_share_an_unknown_symmetric_rate_proves_nothing(model):
    """There errors raise the votes: 38 % of them may stand for 30 % of the texts."""
    q = votes_for_label(0.3, missed=0.2, false_positives=0.2)
    assert q == pytest.approx(0.38)
    assert corrected(model, q) == 0
    assert corrected(symmetric(0.2), q) == pytest.approx(0.3)


# Estimated rates


def test_a_rate_is_estimated_from_3_errors_in_200():
    rate = ErrorRate(errors=3, trials=200)
    assert rate.is_estimated
    assert rate.lower(0.0005) == pytest.approx(0.000752, abs=6e-7)
    assert rate.upper(0.0005) == pytest.approx(0.067793, abs=6e-7)
    known = ErrorRate(0.07)
    assert not known.is_estimated
    assert known.lower(0.0005) == known.upper(0.9) == 0.07


def test_estimated_rates_enter_with_the_end_that_is_safe():
    rate = ErrorRate(errors=3, trials=200)
    for_votes, for_rate = split_alpha(TotalErrors(rate), 0.001)
    q_lower = lower_confidence_bound(85, 100, for_votes)
    low, high = 0.000752, 0.067793
    assert q_lower == pytest.approx(0.702855, abs=6e-7)
    expected = {
        SymmetricErrors(rate): (q_lower - low) / (1 - 2 * low),
        TotalErrors(rate): q_lower - high,
    }
    for model, bound in expected.items():
        assert corrected(model, q_lower, for_rate) == pytest.approx(bound, abs=1e-6)
    found = corrected(FalsePositives({LABEL: rate}), q_lower, for_rate)
    assert found == pytest.approx((q_lower - high) / (1 - high), abs=1e-6)


def test_more_labelled_texts_leave_less_doubt():
    for make in (SymmetricErrors, TotalErrors):
        few, many = (corrected(make(ErrorRate(errors=n // 10, trials=n)), 0.7, 0.0005) for n in (50, 5000))
        assert few < many < corrected(make(ErrorRate(0.1)), 0.7)


class LowerEndOnly(ErrorRate):
    """Both ends of the rate are its lower bound, as if the upper one did not matter."""

    def upper(self, alpha):
        return super().lower(alpha)


class WrongEnd(ErrorRate):
    """Broken on purpose: swaps the ends of the interval."""

    def lower(self, alpha):
        return super().upper(alpha)

    def upper(self, alpha):
        return super().lower(alpha)


def misses(make, rate_type, *, p, rate, q, seed=0, n_cases=800, alpha=0.05):
    """How often the corrected bound exceeds the true share p, votes and rate both being estimated."""
    rng = np.random.default_rng(seed)
    wrong = 0
    for votes, errors in zip(rng.binomial(3000, q, n_cases), rng.binomial(200, rate, n_cases), strict=True):
        model = make(rate_type(errors=int(errors), trials=200))
        for_votes, for_rate = split_alpha(model, alpha)
        q_lower = lower_confidence_bound(int(votes), 3000, for_votes)
        wrong += corrected(model, q_lower, for_rate) > p
    return binomtest(wrong, n_cases, alpha, alternative="greater").pvalue


CASES = {
    "symmetric": (SymmetricErrors, {"p": 0.75, "rate": 0.1, "q": 0.7}),
    "one-sided": (lambda rate: FalsePositives({LABEL: rate}), {"p": 0.6, "rate": 0.3, "q": 0.72}),
    "total": (TotalErrors, {"p": 0.6, "rate": 0.15, "q": 0.75}),
}


@pytest.mark.parametrize("case", CASES)
def test_both_estimates_together_fail_no_more_often_than_alpha(case):
    make, truth = CASES[case]
    assert misses(make, ErrorRate, **truth) > 0.01
    assert misses(make, WrongEnd, **truth) < 1e-6


def false_shares(p_lower, *, n, trials, n_labels, p, rate):
    """P[a corrected certificate is false], summed over all numbers of votes and of errors.

    p_lower : float [trials + 1, n + 1], 0 where the correction is refused.
    """
    q = p * (1 - rate) + (1 - p) * rate / (n_labels - 1)
    together = np.outer(binom.pmf(np.arange(trials + 1), trials, rate), binom.pmf(np.arange(n + 1), n, q))
    return together[p_lower > max(p, 0.5)].sum()


@pytest.mark.parametrize("n_labels", [2, 3, 5])
def test_an_estimated_symmetric_rate_keeps_alpha_whatever_the_true_rate(n_labels):
    """The sum over all outcomes, for true rates on both sides of (K - 1) / K, where an oracle says nothing."""
    n, trials, alpha = 60, 20, 0.05
    for_votes, for_rate = alpha / 2, alpha / 2
    kept, trusting = np.zeros((2, trials + 1, n + 1))
    for errors in range(trials + 1):
        rate = ErrorRate(errors=errors, trials=trials)
        for k in range(n + 1):
            q_lower = lower_confidence_bound(k, n, for_votes)
            for table, model in (
                (kept, SymmetricErrors(rate, n_labels=n_labels)),
                (trusting, SymmetricErrors(LowerEndOnly(errors=errors, trials=trials), n_labels=n_labels)),
            ):
                with contextlib.suppress(InconsistentErrorRateError):
                    table[errors, k] = corrected(model, q_lower, for_rate)
    truths = pairs([0.0, 0.1, 0.3, 0.45, 0.55, 0.7], np.arange(0, 0.95, 0.1))
    settings = {"n": n, "trials": trials, "n_labels": n_labels}
    false = [false_shares(kept, p=p, rate=rate, **settings) for p, rate in truths]
    assert max(false) <= alpha
    assert (kept > 0.5).any()
    if n_labels == 2:
        assert max(false_shares(trusting, p=p, rate=rate, **settings) for p, rate in truths) > 2 * alpha


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_alpha_is_shared_and_nothing_of_it_is_lost(share):
    estimated = ErrorRate(errors=1, trials=9)
    for model in (SymmetricErrors(estimated), TotalErrors(estimated), FalsePositives({LABEL: estimated})):
        for_votes, for_rate = split_alpha(model, 0.01, share=share)
        assert for_votes + for_rate == pytest.approx(0.01, rel=1e-12)
        assert for_rate == pytest.approx(0.01 * share)


@pytest.mark.parametrize("model", [None, SymmetricErrors(), symmetric(0.1), one_sided(0.1), total(0.1)])
def test_a_known_rate_costs_nothing(model):
    assert split_alpha(model, 0.01) == (0.01, 0.0)


def test_one_estimated_rate_among_known_ones_takes_its_share():
    model = FalsePositives({"a": ErrorRate(0.1), "b": ErrorRate(errors=0, trials=50)})
    assert split_alpha(model, 0.01) == (0.005, 0.005)


# Refusals


def test_a_rate_that_contradicts_the_votes_is_refused_and_not_clipped():
    message = r"errs symmetrically at the rate 0\.3 gives no label with probability above 0\.7.*the votes prove 0\.8"
    with pytest.raises(InconsistentErrorRateError, match=message):
        corrected(symmetric(0.3), 0.8)
    assert corrected(symmetric(0.3), 0.7) == pytest.approx(1)
    assert corrected(one_sided(0.3), 0.8) == pytest.approx(5 / 7)
    with pytest.raises(InconsistentErrorRateError, match="above 0.6, but the votes prove 0.61"):
        corrected(symmetric(0.4, n_labels=3), 0.61)


@pytest.mark.parametrize(("n_labels", "useless"), [(2, 0.5), (4, 0.75)])
def test_a_rate_at_which_labels_say_nothing_is_refused(n_labels, useless):
    message = rf"symmetric error rate {useless}: with {n_labels} labels it must be below {useless}"
    with pytest.raises(InconsistentErrorRateError, match=message):
        symmetric(useless, n_labels=n_labels)
    assert corrected(symmetric(useless - 0.01, n_labels=n_labels), 1 / n_labels) == pytest.approx(1 / n_labels)


@pytest.mark.parametrize(
    ("errors", "n_labels", "limit"), [(80, 2, "0.5"), (55, 2, "0.5"), (40, 2, "0.5"), (60, 3, "0.66")]
)
def test_an_estimated_rate_that_may_turn_the_correction_round_is_refused(errors, n_labels, limit):
    """40 errors in 100 do not exclude one half at this alpha; from there on a correction points the wrong way."""
    model = SymmetricErrors(ErrorRate(errors=errors, trials=100), n_labels=n_labels)
    message = rf"rate up to 0\.\d+ \({errors} of 100 labelled texts; label more texts.*must be below {limit}"
    with pytest.raises(InconsistentErrorRateError, match=message):
        corrected(model, 0.8, 0.0005)


def test_an_estimated_rate_whose_upper_bound_lies_below_the_limit_is_used():
    rate = ErrorRate(errors=30, trials=100)
    assert rate.upper(0.0005) < 0.5
    low = rate.lower(0.0005)
    assert corrected(SymmetricErrors(rate), 0.6, 0.0005) == pytest.approx((0.6 - low) / (1 - 2 * low))


def test_a_label_without_a_rate_is_named():
    model = FalsePositives({"safe": ErrorRate(0.1), "unsafe": ErrorRate(0.1)})
    with pytest.raises(InconsistentErrorRateError, match="for the label 'harmless', only for safe, unsafe"):
        corrected(model, 0.7)
    with pytest.raises(InconsistentErrorRateError, match="only for none"):
        corrected(FalsePositives({}), 0.7)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"value": 0.1, "errors": 1, "trials": 10},
        {"errors": 1},
        {"trials": 10},
        {"value": 0.1, "errors": 1},
        {"value": 0.1, "trials": 10},
    ],
)
def test_a_rate_is_known_or_counted(values):
    with pytest.raises(ValueError, match=r"give either value=RATE, or errors=COUNT and trials=COUNT"):
        ErrorRate(**values)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_rate_lies_between_0_and_1(value):
    with pytest.raises(ValueError, match=rf"error rate {value}: a rate lies in \[0, 1\]"):
        ErrorRate(value)


@pytest.mark.parametrize(("errors", "trials"), [(5, 3), (-1, 3), (0, 0)])
def test_counts_that_cannot_be(errors, trials):
    with pytest.raises(ValueError, match=rf"{errors} errors in {trials} trials: counts need 0 <= errors"):
        ErrorRate(errors=errors, trials=trials)


@pytest.mark.parametrize("make", [
    lambda: ErrorRate("0.1"), lambda: ErrorRate(True), lambda: ErrorRate([0.1]),
    lambda: ErrorRate(errors="1", trials="3"), lambda: ErrorRate(errors=1.5, trials=3),
    lambda: ErrorRate(errors=True, trials=3), lambda: ErrorRate(errors=1, trials=float("nan")),
    lambda: SymmetricErrors(n_labels=2.5), lambda: SymmetricErrors(n_labels="2"),
    lambda: split_alpha(None, 0.01, share="0.5"),
])  # fmt: skip
def test_what_is_no_number_is_refused_by_name(make):
    with pytest.raises(TypeError, match=r"^(value|errors|trials|n_labels|share)=.*: give a (whole )?number$"):
        make()


def test_numbers_of_numpy_are_numbers():
    assert ErrorRate(np.float32(0.25)).upper(0.1) == 0.25
    assert ErrorRate(errors=np.int64(1), trials=np.int32(9)).lower(0.1) == ErrorRate(errors=1, trials=9).lower(0.1)
    assert SymmetricErrors(n_labels=np.int64(3)) == SymmetricErrors(n_labels=3)


def test_other_numbers_out_of_range():
    with pytest.raises(ValueError, match="n_labels=1: errors exchange labels, so there are at least 2"):
        SymmetricErrors(n_labels=1)
    for share in (0, 1):
        with pytest.raises(ValueError, match=rf"share={share}: the part of alpha for the error rate lies in \(0, 1\)"):
            split_alpha(None, 0.01, share=share)
    with pytest.raises(ValueError, match="alpha=1.5"):
        split_alpha(None, 1.5)


@pytest.mark.parametrize(
    ("make", "written"),
    [
        (lambda: TotalErrors(0.05), r"TotalErrors\(0.05\): a rate .*write TotalErrors\(ErrorRate\(0.05\)\) for"),
        (lambda: TotalErrors(None), r"TotalErrors\(None\): a rate is an ErrorRate"),
        (lambda: SymmetricErrors(0.05), r"SymmetricErrors\(0.05\): .*write SymmetricErrors\(ErrorRate\(0.05\)\)"),
        (
            lambda: FalsePositives({"y{": 0.05}),
            r"\({'y{': 0.05}\): .*write FalsePositives\({'y{': ErrorRate\(0.05\)}\)",
        ),
        (lambda: FalsePositives(ErrorRate(0.05)), r"each label has a rate; use FalsePositives\({LABEL: ErrorRate\(0"),
    ],
)
def test_a_bare_number_is_no_rate(make, written):
    with pytest.raises(TypeError, match=written):
        make()


@pytest.mark.parametrize("model", [0.05, ErrorRate(0.05), TotalErrors])
def test_what_is_no_error_model(model):
    with pytest.raises(TypeError, match=r"is no error model; use one of SymmetricErrors\(ErrorRate\(0.05\)\)"):
        check_error_model(model)


@pytest.mark.parametrize("model", [None, SymmetricErrors(), symmetric(0.1), one_sided(0.1), total(0.1)])
def test_error_models_and_none_pass(model):
    check_error_model(model)


# Words


@pytest.mark.parametrize(
    ("model", "phrases"),
    [
        (SymmetricErrors(), ["its 2 labels", "one probability, whatever the text says", "below one half"]),
        (symmetric(0.1, n_labels=3), ["its 3 labels", "whatever the text says", "a rate of 0.1)"]),
        (
            SymmetricErrors(ErrorRate(errors=3, trials=200)),
            ["3 of 200 labelled texts", "lower bound used", "below one half"],
        ),
        (SymmetricErrors(ErrorRate(errors=3, trials=200), n_labels=3), ["upper bound below 2/3"]),
        (SymmetricErrors(), ["a rate below one half"]),
        (one_sided(0.1), ["whose true label is another one", "at most this share", "harmless: 0.1)"]),
        (
            FalsePositives({"a": ErrorRate(0.1), "b": ErrorRate(errors=3, trials=200)}),
            ["a: 0.1; b: 3 of 200 labelled texts; upper bounds used"],
        ),
        (total(0.02), ["wrong on at most this share of the texts (0.02)"]),
        (TotalErrors(ErrorRate(errors=3, trials=200)), ["(3 of 200 labelled texts, upper bound used)"]),
    ],
)
def test_an_assumption_says_what_is_assumed_about_which_texts(model, phrases):
    assert "noisy copies of this image" in model.assumption
    for phrase in phrases:
        assert phrase in model.assumption
    assert ("bound" in model.assumption) == model.is_estimated

from functools import partial

import numpy as np
import pytest
from scipy.stats import binom

from medrobust_lib import metrics

# Errors in percent on PBC, averaged over severities (RobustMedCLIP, Table 3): gaussian and impulse noise, motion and
# zoom blur, brightness, contrast, pixelate.
ADAPTED = np.array([67.70, 80.94, 56.05, 35.89, 32.40, 52.02, 75.90])[:, None] / 100
CLIP = np.array([82.42, 82.04, 79.91, 82.80, 80.70, 81.16, 82.06])[:, None] / 100


@pytest.fixture
def rng():
    return np.random.default_rng(20)


@pytest.fixture
def errors(rng):
    """Two models' errors under four corruptions at five severities."""
    return rng.uniform(0.2, 0.9, (2, 4, 5))


def test_corruption_errors_of_a_published_row():
    expected = [82.14, 98.66, 70.14, 43.35, 40.15, 64.10, 92.49]
    np.testing.assert_allclose(metrics.corruption_error(ADAPTED, CLIP), expected, atol=0.005)
    assert metrics.mean_corruption_error(ADAPTED, CLIP) == pytest.approx(70.15, abs=0.005)
    assert metrics.mean_corruption_error(ADAPTED, CLIP, aggregation="ratio of sums") == pytest.approx(
        100 * 400.90 / 571.09
    )
    assert metrics.relative_clean_error(0.1995, 0.8219) == pytest.approx(24.273, abs=0.001)
    assert metrics.average_accuracy(ADAPTED) == pytest.approx(0.4273, abs=5e-5)
    assert metrics.degradation(ADAPTED, 0.1995) == pytest.approx(0.8005 - 0.4273, abs=5e-5)


def test_severities_are_summed_before_the_ratio_is_taken():
    error, reference = [[0.1, 0.9]], [[0.2, 0.3]]
    np.testing.assert_allclose(metrics.corruption_error(error, reference), [200])  # the ratios' mean is 175
    np.testing.assert_allclose(metrics.corruption_error(error[0], reference[0]), 200)


@pytest.mark.parametrize("aggregation", metrics.AGGREGATIONS)
def test_the_reference_itself_is_100(errors, aggregation):
    np.testing.assert_allclose(metrics.corruption_error(errors, errors), 100)
    np.testing.assert_allclose(metrics.mean_corruption_error(errors, errors, aggregation=aggregation), 100)
    clean = np.array([0.1, 0.15])
    np.testing.assert_allclose(metrics.relative_mean_corruption_error(errors, clean, errors, clean).mean, 100)


@pytest.mark.parametrize("aggregation", metrics.AGGREGATIONS)
def test_order_and_scale_do_not_matter(errors, rng, aggregation):
    model, reference = errors
    mce = partial(metrics.mean_corruption_error, aggregation=aggregation)
    order = rng.permutation(4)
    severities = rng.permuted(model, axis=1)
    np.testing.assert_allclose(mce(severities[order], reference[order]), mce(model, reference))
    np.testing.assert_allclose(mce(model / 3, reference / 3), mce(model, reference))
    np.testing.assert_allclose(mce(model / 3, reference), mce(model, reference) / 3)


def test_the_aggregations_agree_where_the_reference_errs_alike(errors):
    model, reference = errors[0], np.full((4, 1), 0.4)
    by_ratio = metrics.mean_corruption_error(model, reference)
    assert by_ratio == pytest.approx(metrics.mean_corruption_error(model, reference, aggregation="ratio of sums"))
    reference[0] = 0.1
    assert metrics.mean_corruption_error(model, reference) != pytest.approx(
        metrics.mean_corruption_error(model, reference, aggregation="ratio of sums"), rel=0.05
    )


def test_the_ratio_of_sums_weighs_corruptions_by_the_references_error():
    model, reference = [[0.3], [0.4]], [[0.1], [0.8]]
    assert metrics.mean_corruption_error(model, reference) == pytest.approx(175)
    assert metrics.mean_corruption_error(model, reference, aggregation="ratio of sums") == pytest.approx(700 / 9)


def test_leading_axes_are_models(errors):
    together = metrics.mean_corruption_error(errors, errors[0])
    assert together.shape == (2,)
    np.testing.assert_allclose(together, [metrics.mean_corruption_error(e, errors[0]) for e in errors])
    assert metrics.corruption_error(errors, errors[0]).shape == (2, 4)
    assert metrics.average_accuracy(errors).shape == (2,)


def test_a_reference_without_errors_leaves_the_mean_of_ratios_undefined():
    model, reference = [[0.3], [0.4]], [[0.0], [0.8]]
    np.testing.assert_array_equal(np.isnan(metrics.corruption_error(model, reference)), [True, False])
    assert np.isnan(metrics.mean_corruption_error(model, reference))
    assert metrics.mean_corruption_error(model, reference, aggregation="ratio of sums") == pytest.approx(87.5)
    assert np.isnan(metrics.relative_clean_error(0.1, 0.0))


def test_relative_errors_divide_what_is_lost_by_what_the_reference_loses():
    model, reference = [[0.3, 0.5], [0.2, 0.4]], [[0.5, 0.7], [0.3, 0.7]]
    relative = metrics.relative_mean_corruption_error(model, 0.2, reference, 0.4).each
    np.testing.assert_allclose(relative, [100, 100])
    relative = metrics.relative_mean_corruption_error(model, 0.1, reference, 0.3).each
    np.testing.assert_allclose(relative, [100, 100])
    relative = metrics.relative_mean_corruption_error(model, 0.35, reference, 0.3).each
    np.testing.assert_allclose(relative, [100 * 0.05 / 0.3, -25])


@pytest.mark.parametrize("rise", [0.0, 0.004, 0.01, -0.05])
def test_a_reference_that_hardly_loses_is_left_out_and_counted(rise):
    """Zero, a small or a negative denominator never becomes a huge or a negative ratio."""
    reference = [[0.5], [0.3 + rise]]
    model = [[0.6], [0.6]]
    relative = metrics.relative_mean_corruption_error(model, 0.2, reference, 0.3).each
    assert relative[0] == pytest.approx(200)
    assert np.isnan(relative[1])
    guarded = metrics.relative_mean_corruption_error(model, 0.2, reference, 0.3)
    assert (guarded.mean, guarded.left_out) == (pytest.approx(200), 1)


def test_nothing_left_is_no_number():
    guarded = metrics.relative_mean_corruption_error(ADAPTED, 0.1995, CLIP, 0.8219)
    assert np.isnan(guarded.mean)  # CLIP is hardly worse under any corruption
    assert guarded.left_out == 7


def test_the_guard_can_be_moved_and_switched_off():
    reference, model = [[0.5], [0.25]], [[0.6], [0.6]]
    assert metrics.relative_mean_corruption_error(model, 0.2, reference, 0.3, least_rise=0.3).left_out == 2
    unguarded = metrics.relative_mean_corruption_error(model, 0.2, reference, 0.3, least_rise=-np.inf)
    assert (unguarded.mean, unguarded.left_out) == (pytest.approx((200 - 800) / 2), 0)
    # A difference of exactly nothing has no ratio, with or without a guard.
    level = metrics.relative_mean_corruption_error(model, 0.2, [[0.5], [0.3]], 0.3, least_rise=-np.inf)
    assert (level.mean, level.left_out) == (pytest.approx(200), 1)


def test_an_interval_of_two_by_hand(rng):
    """The error of one image in two: the resampled error is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4."""
    low, high = metrics.bootstrap_interval(lambda error: error, [True, False], rng=rng, confidence=0.95)
    assert (low, high) == (0, 1)
    assert metrics.bootstrap_interval(lambda error: error, [True, False], rng=rng, confidence=0.3) == (0.5, 0.5)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_an_error_rate_is_resampled_by_the_binomial_law(rng, confidence):
    correct = np.arange(100) >= 40
    interval = metrics.bootstrap_interval(lambda e: e, correct, rng=rng, resamples=40_000, confidence=confidence)
    tail = (1 - confidence) / 2
    assert interval == pytest.approx(tuple(binom.ppf([tail, 1 - tail], 100, 0.4) / 100))


def test_intervals_repeat_with_the_seed_and_hold_the_estimate(rng):
    correct, reference = rng.random((2, 4, 5, 300)) < np.array([0.7, 0.4])[:, None, None, None]
    estimate = metrics.mean_corruption_error(1 - correct.mean(-1), 1 - reference.mean(-1))
    intervals = [
        metrics.bootstrap_interval(
            metrics.mean_corruption_error, correct, reference, rng=np.random.default_rng(seed), resamples=400
        )
        for seed in (1, 1, 2)
    ]
    assert intervals[0] == intervals[1] != intervals[2]
    assert intervals[0][0] < estimate < intervals[0][1]


def test_images_stay_together(rng):
    """Ten corrupted versions of an image that succeed or fail together are no more than one."""
    correct = np.tile(rng.random(200) < 0.6, (5, 2, 1))
    one = metrics.bootstrap_interval(lambda error: error, correct[0, 0], rng=np.random.default_rng(3))
    ten = metrics.bootstrap_interval(lambda e: 1 - metrics.average_accuracy(e), correct, rng=np.random.default_rng(3))
    np.testing.assert_allclose(ten, one)


def test_a_model_is_compared_with_its_reference_on_the_same_images(rng):
    correct = rng.random((3, 2, 150)) < 0.5
    low, high = metrics.bootstrap_interval(metrics.mean_corruption_error, correct, correct, rng=rng)
    assert (low, high) == (pytest.approx(100), pytest.approx(100))


def test_intervals_cover_the_truth(rng):
    """Nominal 95 %: 200 simulated experiments with correlated corruptions and a correlated reference."""
    n, images, wrong, wrong_reference = 200, 200, np.array([0.3, 0.5, 0.4]), np.array([0.6, 0.7, 0.5])
    truth = metrics.mean_corruption_error(wrong[:, None], wrong_reference[:, None])
    covered = 0
    for _ in range(n):
        difficulty = rng.random(images)  # shared by all versions of an image
        own = np.where(rng.random((3, images)) < 0.5, difficulty, rng.random((3, images)))
        other = np.where(rng.random((3, images)) < 0.5, difficulty, rng.random((3, images)))
        correct, reference = own >= wrong[:, None], other >= wrong_reference[:, None]
        low, high = metrics.bootstrap_interval(
            metrics.mean_corruption_error, correct[:, None], reference[:, None], rng=rng, resamples=200
        )
        covered += low <= truth <= high
    assert 0.91 <= covered / n <= 0.985


def test_undefined_resamples_leave_no_interval(rng):
    correct, reference = np.zeros((1, 1, 4), bool), np.array([[[True, True, True, False]]])
    assert np.isnan(metrics.bootstrap_interval(metrics.mean_corruption_error, correct, reference, rng=rng)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.corruption_error([[80.0]], [[0.5]]), r"errors holds 80: give fractions in \[0, 1\]"),
        (lambda: metrics.corruption_error([[0.5]], [[-0.1]]), r"reference_errors holds -0.1: give fractions"),
        (lambda: metrics.corruption_error([[np.nan]], [[0.5]]), r"errors holds nan: give fractions"),
        (lambda: metrics.relative_clean_error(0.5, 50), r"reference_clean_error holds 50"),
        (lambda: metrics.mean_corruption_error([0.5], [0.5]), r"errors must have axes \[\.\.\., corruptions, sev"),
        (lambda: metrics.corruption_error(0.5, 0.5), r"errors must have axes \[\.\.\., severities\], got shape \(\)"),
        (
            lambda: metrics.mean_corruption_error(np.full((7, 5), 0.5), np.full((1, 5), 0.5)),
            r"errors of 7 corruptions cannot be compared with a reference's of 1",
        ),
        (
            lambda: metrics.mean_corruption_error([[0.5]], [[0.5]], aggregation="mean"),
            r"unknown aggregation 'mean'; choose one of mean of ratios, ratio of sums",
        ),
        (
            lambda: metrics.bootstrap_interval(lambda a, b: a, [True], [True, False], rng=np.random.default_rng()),
            r"same images on their last axis, got shapes \[\(1,\), \(2,\)\]",
        ),
        (
            lambda: metrics.bootstrap_interval(np.mean, [True, False], rng=np.random.default_rng()),
            r"must return 1000 numbers, one a resample, got shape \(\)",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

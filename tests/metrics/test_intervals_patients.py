"""Intervals where several images are of one patient."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from medrobust_lib import metrics
from medrobust_lib.metrics.classification import paired_interval


def test_without_repeated_patients_the_interval_is_that_of_images():
    right = np.array([True] * 7 + [False] * 5)
    assert metrics.share_interval(right, groups=list("abcdefghijkl")) == metrics.accuracy_interval(7, 12)
    assert metrics.share_interval(right) == metrics.accuracy_interval(7, 12)


def test_images_of_a_patient_that_all_agree_count_as_one():
    # Twelve patients with ten images each, all right or all wrong: no more is known than from twelve images.
    patients = np.repeat(np.arange(12), 10)
    right = patients < 7
    low, high = metrics.share_interval(right, groups=patients)
    one_low, one_high = metrics.accuracy_interval(7, 12)
    assert low == pytest.approx(one_low, abs=0.05) and low <= one_low and high >= one_high
    assert high - low > 2 * np.diff(metrics.accuracy_interval(70, 120))[0]


def test_unanimous_images_bound_as_many_patients():
    patients = np.repeat(["x", "y", "z"], 50)
    assert metrics.share_interval(np.ones(150), groups=patients) == metrics.accuracy_interval(3, 3)
    low, high = metrics.mean_interval(np.full(150, 0.5), groups=patients, largest=0.5)
    assert high - 0.5 == pytest.approx(0.5 * metrics.accuracy_interval(0, 3)[1]) == pytest.approx(0.5 - low)


def test_one_patient_says_nothing_of_others():
    low, high = metrics.share_interval([1, 0, 1, 0], groups=["x"] * 4)
    assert low < 0.001 and high > 0.999


@pytest.mark.parametrize("sizes", [[12] * 10, [12] * 40, [50] + [1] * 20, [30] + [1] * 30, [20, 10, 5] + [1] * 15])
def test_coverage_where_images_of_a_patient_resemble_each_other(sizes):
    rng, hits, naive = np.random.default_rng(0), 0, 0
    patients = np.repeat(np.arange(len(sizes)), sizes)
    for _ in range(300):
        chance = rng.beta(1.05, 0.45, len(sizes))  # mean 0.7, differing between patients
        right = rng.random(len(patients)) < chance[patients]
        low, high = metrics.share_interval(right, groups=patients)
        hits += low <= 0.7 <= high
        low, high = metrics.share_interval(right)
        naive += low <= 0.7 <= high
    assert hits >= 0.95 * 300 and naive < 0.91 * 300


SIZES = [[4] * 8, [12] * 10, [12] * 40, [30] + [1] * 30, [20, 10, 5] + [1] * 15]


@pytest.mark.parametrize("sizes", SIZES)
def test_coverage_of_a_difference_where_images_of_a_patient_change_alike(sizes):
    rng, hits = np.random.default_rng(0), 0
    patients = np.repeat(np.arange(len(sizes)), sizes)
    for _ in range(300):
        gains = rng.beta(0.4, 1.6, len(sizes))  # mean 0.2, differing between patients
        draw = rng.random(len(patients))
        change = (draw < gains[patients]).astype(int) - (draw > 0.95)  # 0.05 are lost
        low, high = paired_interval(change, groups=patients)
        hits += low <= 0.15 <= high
    assert hits >= 0.95 * 300


@pytest.mark.parametrize("sizes", SIZES)
def test_coverage_of_a_mean_over_a_few_patients(sizes):
    rng, hits = np.random.default_rng(0), 0
    patients = np.repeat(np.arange(len(sizes)), sizes)
    for _ in range(300):
        values = rng.normal(0, 1, len(sizes))[patients] + rng.normal(0.3, 0.5, len(patients))
        low, high = metrics.mean_interval(values, groups=patients)
        hits += low <= 0.3 <= high
    assert hits >= 0.93 * 300


def test_an_interval_over_patients_is_no_narrower_for_a_handful_of_them():
    """Thirty images of nine patients, five gained and one lost: the image-wise interval holds zero."""
    change = np.repeat([1, -1, 0], [5, 1, 24])
    patients = np.random.default_rng(0).permutation(np.arange(30) % 9)
    low, high = paired_interval(change, groups=patients)
    alone = paired_interval(change)
    assert low <= alone[0] < 0 < alone[1] <= high


def test_with_an_image_for_each_patient_but_one_t_is_near_students():
    values = np.random.default_rng(0).normal(size=41)
    patients = [0, 0, *range(1, 40)]
    half = np.diff(metrics.mean_interval(values, groups=patients))[0] / 2
    assert half == pytest.approx(stats.t.ppf(0.975, 39) * stats.sem(values), rel=0.1)


def test_one_error_more_never_raises_the_lower_limit():
    patients, lows = np.repeat(np.arange(10), 10), []
    for errors in (0, 1, 2, 3, 5, 8, 12):
        right = np.arange(100) >= errors
        lows.append(metrics.share_interval(right, groups=patients)[0])
    assert lows[0] > lows[1] and max(np.diff(lows)) < 0.02


def test_a_bootstrap_of_patients_is_wider_than_one_of_images():
    patients = np.repeat(np.arange(15), 8)
    errors = np.repeat(np.random.default_rng(1).random(15), 8)
    wide, narrow = (np.diff(metrics.mean_interval(errors, **how))[0] for how in ({"groups": patients}, {}))
    assert wide > 2 * narrow
    right = np.repeat(np.random.default_rng(2).random(15) < 0.6, 8)[None, None]
    spans = [
        np.diff(
            metrics.bootstrap_interval(
                metrics.mean_corruption_error, right, ~right, rng=np.random.default_rng(3), **how
            )
        )
        for how in ({"groups": patients}, {})
    ]
    assert spans[0][0] > 2 * spans[1][0]


def test_groups_of_another_number_are_refused():
    with pytest.raises(ValueError, match="2 groups for 3 values"):
        metrics.share_interval([1, 0, 1], groups=["a", "b"])


def test_certified_accuracy_goes_by_patient_where_its_rows_know_them():

    rows = pd.DataFrame(
        {"predicted": [0] * 20, "label": [0] * 10 + [1] * 10, "radius": 1.0, "method": "m", "sigma": 0.5}
    )
    by_image = metrics.certified_accuracy(rows, [0.5]).iloc[0]
    by_patient = metrics.certified_accuracy(rows.assign(patient=np.repeat(["p", "q", "r", "s"], 5)), [0.5]).iloc[0]
    assert by_patient["certified_accuracy"] == by_image["certified_accuracy"] == 0.5
    assert by_patient["patients"] == 4 and by_patient["high"] - by_patient["low"] > by_image["high"] - by_image["low"]

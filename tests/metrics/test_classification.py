import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score

from medrobust_lib import metrics


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 400)
    predictions = np.where(rng.random(400) < 0.6, labels, rng.integers(0, 5, 400))
    return labels, predictions


def test_agree_with_scikit_learn(case):
    labels, predictions = case
    assert metrics.accuracy(labels, predictions) == pytest.approx(accuracy_score(labels, predictions))
    assert metrics.balanced_accuracy(labels, predictions) == pytest.approx(balanced_accuracy_score(labels, predictions))
    np.testing.assert_allclose(
        metrics.per_class_recall(labels, predictions, n_classes=5), recall_score(labels, predictions, average=None)
    )


def test_known_values():
    assert metrics.accuracy([0, 1, 1, 2], [0, 1, 2, 2]) == 0.75
    assert metrics.balanced_accuracy([0, 0, 0, 1], [0, 0, 0, 0]) == 0.5
    assert metrics.majority_share([2, 2, 2, 1]) == 0.75


def test_abstentions_count_as_wrong():
    assert metrics.accuracy([0, 1], [0, -1]) == 0.5
    assert metrics.balanced_accuracy([0, 1], [0, -1]) == 0.5


def test_constant_predictor_scores_one_over_k_whatever_the_prevalence():
    labels = np.repeat([0, 1, 2, 3], [70, 20, 9, 1])
    for answer in range(4):
        assert metrics.balanced_accuracy(labels, np.full(100, answer)) == pytest.approx(0.25)
    assert metrics.is_constant_predictor(np.zeros(100, int))
    assert not metrics.is_constant_predictor(np.arange(100) % 4)


def test_recall_of_an_absent_class_is_nan_and_left_out_of_the_mean():
    recall = metrics.per_class_recall([0, 0, 2], [0, 1, 2], n_classes=4)
    np.testing.assert_array_equal(np.isnan(recall), [False, True, False, True])
    assert metrics.balanced_accuracy([0, 0, 2], [0, 1, 2]) == pytest.approx(0.75)


def test_interval_is_clopper_pearson():
    for k, n, confidence in ((85, 100, 0.95), (1, 7, 0.9), (0, 10, 0.95), (10, 10, 0.95), (30, 90, 0.999)):
        exact = binomtest(k, n).proportion_ci(confidence_level=confidence, method="exact")
        found = metrics.accuracy_interval(k, n, confidence=confidence)
        assert found == pytest.approx((exact.low, exact.high), abs=1e-9)
    assert metrics.accuracy_interval(0, 10)[0] == 0
    assert metrics.accuracy_interval(10, 10)[1] == 1


@pytest.mark.parametrize(("k", "n", "confidence"), [(5, 4, 0.95), (-1, 4, 0.95), (0, 0, 0.95), (1, 2, 1.0)])
def test_counts_that_cannot_be_are_named(k, n, confidence):
    with pytest.raises(ValueError, match=f"correct={k}, n={n}, confidence={confidence}: give"):
        metrics.accuracy_interval(k, n, confidence=confidence)


def test_interval_covers_the_truth_at_least_as_often_as_it_says():
    hits = np.random.default_rng(1).binomial(40, 0.3, 2000)
    bounds = {k: metrics.accuracy_interval(k, 40) for k in set(hits.tolist())}
    covered = np.mean([bounds[k][0] <= 0.3 <= bounds[k][1] for k in hits.tolist()])
    assert covered >= 0.95


def test_perfectly_calibrated_and_overconfident():
    # Ten images at confidence .8, eight of them right; then the same at confidence 1.
    labels = np.array([0] * 8 + [1] * 2)
    assert metrics.expected_calibration_error(np.tile([0.8, 0.2], (10, 1)), labels) == pytest.approx(0, abs=1e-12)
    assert metrics.expected_calibration_error(np.tile([1.0, 0.0], (10, 1)), labels) == pytest.approx(0.2)


def test_calibration_bins_count_every_image_once():
    rng = np.random.default_rng(2)
    probabilities = rng.dirichlet(np.ones(3), 500)
    bins = metrics.calibration_bins(probabilities, rng.integers(0, 3, 500), n_bins=15)
    assert bins.n.sum() == 500
    filled = bins[bins.n > 0]
    assert ((filled.confidence >= filled.low - 1e-12) & (filled.confidence <= filled.high + 1e-12)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.accuracy([0, 1], [0]), r"labels \(2,\) and predictions \(1,\) must have the same shape"),
        (lambda: metrics.accuracy([], []), "labels must be a non-empty vector of integers"),
        (lambda: metrics.accuracy([0.5], [0]), "labels must be a non-empty vector of integers, got float64"),
        (lambda: metrics.per_class_recall([5], [0], n_classes=3), "labels run from 5 to 5, but n_classes=3"),
        (lambda: metrics.calibration_bins([[2.0, 1.0]], [0]), "pass softmax outputs, not logits"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

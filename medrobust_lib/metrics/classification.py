"""Accuracy, calibration and intervals: pure functions of label, prediction and probability arrays.

Predictions may hold -1 for an abstention. An abstention is never correct and always stays in the
denominator. Intervals are over images, or over patients where images are told to be of one: other images, or other
patients, of the same kind would give another number.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.stats import beta

CONSTANT_SHARE = 0.95  # a predictor this one-sided carries almost no information about the image


def accuracy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Top-1 accuracy.

    Parameters
    ----------
    labels : int [n]
        True classes, 0 to K-1.
    predictions : int [n]
        Predicted classes, or -1 for an abstention.

    Returns
    -------
    float in [0, 1]

    Raises
    ------
    ValueError
        Shapes differ or nothing was predicted.
    """
    labels, predictions = _paired(labels, predictions)
    return float(np.mean(labels == predictions))


def per_class_recall(labels: ArrayLike, predictions: ArrayLike, *, n_classes: int) -> NDArray[np.float64]:
    """Share of each class's images that are predicted correctly; NaN where a class has no image.

    Parameters
    ----------
    labels, predictions : int [n]
        As in `accuracy`.
    n_classes : int
        Number of classes K.

    Returns
    -------
    float64 [K] in [0, 1] or NaN
    """
    labels, predictions = _paired(labels, predictions)
    if labels.max() >= n_classes or labels.min() < 0:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}, but n_classes={n_classes}")
    images = np.bincount(labels, minlength=n_classes)
    hits = np.bincount(labels[labels == predictions], minlength=n_classes)
    return np.divide(hits, images, out=np.full(n_classes, np.nan), where=images > 0)


def balanced_accuracy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Mean recall over the classes that occur in `labels`; 1/K for any constant predictor.

    Parameters
    ----------
    labels, predictions : int [n]
        As in `accuracy`.

    Returns
    -------
    float in [0, 1]
    """
    labels, predictions = _paired(labels, predictions)
    return float(np.nanmean(per_class_recall(labels, predictions, n_classes=int(labels.max()) + 1)))


def majority_share(predictions: ArrayLike) -> float:
    """Share of the most frequent prediction: 1 for a constant predictor.

    Parameters
    ----------
    predictions : int [n]
        Predicted classes, or -1 for an abstention.

    Returns
    -------
    float in (0, 1]
    """
    predictions = _integers("predictions", predictions)
    return float(np.unique(predictions, return_counts=True)[1].max() / predictions.size)


def is_constant_predictor(predictions: ArrayLike, *, share: float = CONSTANT_SHARE) -> bool:
    """Whether (nearly) every image gets the same answer.

    An accuracy equal to the share of the largest class is then no achievement: several published
    zero-shot rows are of this kind (RobustMedCLIP, Table 3: 73.08 % = 114/156 in every column).

    Parameters
    ----------
    predictions : int [n]
    share : float in (0, 1]
        Smallest `majority_share` that counts as constant.
    """
    return majority_share(predictions) >= share


def calibration_bins(probabilities: ArrayLike, labels: ArrayLike, *, n_bins: int = 10) -> pd.DataFrame:
    """Confidence against accuracy in equal-width bins of the top-1 probability.

    Parameters
    ----------
    probabilities : float [n, K]
        Rows sum to 1.
    labels : int [n]
    n_bins : int
        Number of bins over [0, 1].

    Returns
    -------
    DataFrame with columns low, high, n, confidence, accuracy
        One row per bin; confidence and accuracy are NaN in empty bins.

    Raises
    ------
    ValueError
        Rows that do not sum to 1, or shapes that do not match.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2 or not np.allclose(probabilities.sum(1), 1, atol=1e-3):
        raise ValueError("probabilities must be [n, K] with rows that sum to 1; pass softmax outputs, not logits")
    labels, predictions = _paired(labels, probabilities.argmax(1))
    confidence = probabilities.max(1)
    edges = np.linspace(0, 1, n_bins + 1)
    # The right edge belongs to the bin, so that a confidence of exactly 1 is counted.
    bins = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, n_bins - 1)
    count = np.bincount(bins, minlength=n_bins)
    filled = np.where(count > 0, count, np.nan)
    return pd.DataFrame(
        {
            "low": edges[:-1],
            "high": edges[1:],
            "n": count,
            "confidence": np.bincount(bins, confidence, n_bins) / filled,
            "accuracy": np.bincount(bins, labels == predictions, n_bins) / filled,
        }
    )


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, *, n_bins: int = 10) -> float:
    """Mean gap between confidence and accuracy over the bins, weighted by their size (Guo et al. 2017).

    Parameters
    ----------
    probabilities : float [n, K]
    labels : int [n]
    n_bins : int
        As in `calibration_bins`.

    Returns
    -------
    float in [0, 1]
    """
    bins = calibration_bins(probabilities, labels, n_bins=n_bins).query("n > 0")
    return float(((bins.confidence - bins.accuracy).abs() * bins.n).sum() / bins.n.sum())


def _paired(labels: ArrayLike, predictions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    labels, predictions = _integers("labels", labels), _integers("predictions", predictions)
    if labels.shape != predictions.shape:
        raise ValueError(f"labels {labels.shape} and predictions {predictions.shape} must have the same shape")
    return labels, predictions


def _integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be a non-empty vector of integers, got {array.dtype} {array.shape}")
    return array.astype(np.int64)


def accuracy_interval(correct: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Exact (Clopper-Pearson) two-sided interval of a proportion.

    Parameters
    ----------
    correct, n : int
        Number of hits and of trials, 0 <= correct <= n, n >= 1.
    confidence : float in (0, 1)

    Returns
    -------
    low, high : float in [0, 1]

    Raises
    ------
    ValueError
        Counts or confidence out of range.
    """
    if not 0 <= correct <= n or n < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"correct={correct}, n={n}, confidence={confidence}: give 0 <= correct <= n, n >= 1 and a confidence "
            "between 0 and 1"
        )
    return _clopper_pearson(correct, n, confidence)


def _clopper_pearson(correct: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """The interval, whose formula takes broken numbers too."""
    # The quantiles themselves: binomtest also works out a p-value, which takes most of a table's time.
    tail = (1 - confidence) / 2
    low = beta.ppf(tail, correct, n - correct + 1) if correct else 0.0
    high = beta.ppf(1 - tail, correct + 1, n - correct) if correct < n else 1.0
    return float(low), float(high)


def mean_interval(
    values: ArrayLike, *, groups: Sequence[Hashable] = (), largest: float = 1.0, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a mean over images: a percentile bootstrap, seeded, or a jackknife over patients.

    Parameters
    ----------
    values : float [n]
        One value an image.
    groups : sequence of n, optional
        The patient of each image. Of a few a bootstrap covers too little: each is left out once, and Student's t
        takes their number into account.
    largest : float
        How far the value of one image could lie from that of the others: 1 for shares.
    seed : int

    Returns
    -------
    low, high : float
        Where all images have one value, a bootstrap knows no spread: then n images (or patients) bound the share that
        could differ (Clopper-Pearson), and the interval reaches that share times ``largest`` to either side.

    References
    ----------
    Efron and Tibshirani 1993, chapters 11 and 13.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"an interval of a mean needs a vector of at least one value, got shape {array.shape}")
    members = _members(groups, len(array))
    images = np.bincount(members)
    totals = np.bincount(members, weights=array)
    if np.ptp(array) == 0 or len(images) == 1:
        unseen = largest * accuracy_interval(0, len(images))[1]
        return float(array.mean() - unseen), float(array.mean() + unseen)
    if len(images) < len(array):
        # Patients differ in how many images they have: as many of one size would weigh as much.
        weigh_as = array.size**2 / float(images @ images)
        without = (array.sum() - totals) / (array.size - images)
        error = math.sqrt((1 - 1 / len(images)) * float(((without - array.mean()) ** 2).sum()))
        aside = float(stats.t.ppf(0.975, max(weigh_as - 1, 0.1))) * error
        return float(array.mean() - aside), float(array.mean() + aside)
    how = {"n_resamples": 2000, "method": "percentile", "batch": max(1, 10_000_000 // len(images))}
    low, high = stats.bootstrap((array,), np.mean, rng=np.random.default_rng(seed), **how).confidence_interval
    return float(low), float(high)


def share_interval(values: ArrayLike, *, groups: Sequence[Hashable] = (), seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of values in [0, 1], within [0, 1].

    Parameters
    ----------
    values : float [n]
        One value an image; for an accuracy whether it is right.
    groups : sequence of n, optional
        The patient of each image, as in ``ImageDataset.groups``. Where one has several images, these count as fewer:
        as many as would vary as much if they were independent.
    seed : int
        Of the bootstrap.

    Returns
    -------
    low, high : float
        Clopper-Pearson where all values are 0 or 1, with an effective number of images after Korn and Graubard where
        patients have several; else `mean_interval`. Of few 0/1 values a bootstrap covers too little. With patients it
        is no exact interval but a cautious one: it covered .96 and more of what was simulated, also where one patient
        has most of the images and it says next to nothing.

    Raises
    ------
    ValueError
        No values, or another number of groups.

    References
    ----------
    Korn and Graubard 1998, Survey Methodology 24:193.
    """
    array = np.asarray(values, dtype=np.float64)
    if not array.size or not np.isin(array, (0, 1)).all():
        low, high = mean_interval(array, groups=groups, seed=seed)
        return max(low, 0.0), min(high, 1.0)
    members, n, share = _members(groups, len(array)), array.size, float(array.mean())
    images = np.bincount(members)
    patients = n**2 / float(images @ images)  # as many of one size would weigh as much
    if len(images) == n:
        return accuracy_interval(int(array.sum()), n)
    effective = patients
    if 0 < share < 1 and len(images) > 1:
        # Two more patients, one always right and one always wrong: of few errors the data tell no spread of patients.
        sizes = np.append(images, [images.mean()] * 2)
        right = np.append(np.bincount(members, weights=array), [0, images.mean()])
        pooled = right.sum() / sizes.sum()
        apart = right - pooled * sizes
        spread = len(sizes) / (len(sizes) - 1) * float(apart @ apart) / sizes.sum() / (pooled * (1 - pooled))
        fewer = stats.t.ppf(0.975, n - 1) / stats.t.ppf(0.975, max(patients - 1, 0.1))
        effective = n / max(spread, 1.0) * float(fewer) ** 2
    return _clopper_pearson(share * effective, effective)


def _members(groups: Sequence[Hashable], n: int) -> NDArray[np.int64]:
    """Number of each image's group; without groups each image is one."""
    if not len(groups):
        return np.arange(n)
    if len(groups) != n:
        raise ValueError(f"{len(groups)} groups for {n} values; give the group of each")
    return pd.factorize(np.asarray(groups))[0]


def bootstrap_interval(
    statistic: Callable[..., NDArray[np.float64]],
    *correct: ArrayLike,
    rng: np.random.Generator,
    groups: Sequence[Hashable] = (),
    resamples: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval over images of any function of errors in `medrobust_lib.metrics.corruption`.

    Each resample draws images with replacement and takes the same ones for every array: an image's corrupted
    versions stay together, and a model and its reference are compared on the same images (paired).

    Parameters
    ----------
    statistic : callable
        Takes as many arrays of errors as there are ``correct``, each with an axis of resamples in front, and
        returns one number a resample: `mean_corruption_error`, ``functools.partial`` of it, or a lambda.
    *correct : bool [..., n]
        Whether each of the same n images is classified correctly, for example [C, S, n] for the model and for
        the reference, or [n] on the clean images.
    rng : numpy.random.Generator
    groups : sequence of n, optional
        The patient of each image: then patients are drawn, each with all its images.
    resamples : int
    confidence : float in (0, 1)

    Returns
    -------
    low, high : float
        NaN if the statistic is undefined in any resample; equal if all images agree, for resamples of them know no
        spread. Of few images a bootstrap covers too little; for a single share `accuracy_interval` is exact.

    Raises
    ------
    ValueError
        Not the same number of images, no images, or a statistic that does not return one number a resample.

    References
    ----------
    Efron and Tibshirani 1993, chapter 13.
    """
    arrays = [np.asarray(array, dtype=np.float64) for array in correct]
    images = {array.shape[-1] if array.ndim else 0 for array in arrays}
    if len(images) != 1 or 0 in images:
        raise ValueError(f"all arrays need the same images on their last axis, got shapes {[a.shape for a in arrays]}")
    n = images.pop()
    # How often each image is drawn: one matrix product then resamples every corruption and severity at once.
    members = _members(groups, n)
    drawn = int(members.max()) + 1
    draws = rng.multinomial(drawn, np.full(drawn, 1 / drawn), size=resamples).astype(np.float64)[:, members]
    images = draws.sum(axis=1, keepdims=True)
    errors = [
        np.clip(1 - (draws @ array.reshape(-1, n).T) / images, 0, 1).reshape(resamples, *array.shape[:-1])
        for array in arrays
    ]
    values = np.asarray(statistic(*errors))
    if values.shape != (resamples,):
        raise ValueError(f"the statistic must return {resamples} numbers, one a resample, got shape {values.shape}")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_interval(change: ArrayLike, *, groups: Sequence[Hashable] = ()) -> tuple[float, float]:
    """Interval of the difference of two shares of the same images.

    The difference is that of two shares of one multinomial, so it is `difference_interval` of their intervals
    (`share_interval`) with the multinomial's correlation. Enumerated exactly at 12, 24, 45 and 90 images, it covers at
    least .96 where up to three tenths of them differ, .95 up to nine tenths and .92 beyond. Where all that differ were
    gained Tango's score interval falls to .93, Newcombe's method 10 to .90, Agresti and Min's to .84.

    Parameters
    ----------
    change : int [n]
        1 for an image that only the second gets right, -1 for one that only the first does, else 0.
    groups : sequence of n, optional
        The patient of each image, as in `share_interval`.

    Returns
    -------
    low, high : float in [-1, 1]
        Of the mean change.

    References
    ----------
    Newcombe 1998, Statistics in Medicine 17:2635, compares intervals for paired shares.
    """
    array = np.asarray(change)
    gained, lost = array > 0, array < 0
    others = float((~gained).sum()) * float((~lost).sum())
    correlation = -math.sqrt(float(gained.sum()) * float(lost.sum()) / others) if others else 0.0
    limits = [(float(side.mean()), *share_interval(side, groups=groups)) for side in (lost, gained)]
    return difference_interval(*limits, correlation=correlation)


def difference_interval(
    first: tuple[float, float, float], second: tuple[float, float, float], *, correlation: float = 0.0
) -> tuple[float, float]:
    """Interval of second minus first from the intervals of two results.

    Each limit takes up the squares of the distances of the two values from the limits that push it outwards.

    Parameters
    ----------
    first, second : tuple of float
        Value, low and high.
    correlation : float in [-1, 1]
        Of the two values; 0 for independent results.

    Returns
    -------
    low, high : float

    References
    ----------
    Newcombe 1998, Statistics in Medicine 17:873, method 10, for proportions, and 17:2635, method 10, with a
    correlation; Zou and Donner 2008, Statistics in Medicine 27:1693, for anything with intervals.
    """
    (a, a_low, a_high), (b, b_low, b_high) = first, second

    def apart(up: float, down: float) -> float:
        return math.sqrt(max(up**2 + down**2 - 2 * correlation * up * down, 0.0))

    return b - a - apart(b - b_low, a_high - a), b - a + apart(b_high - b, a - a_low)


def mcnemar_p(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test of whether the same images are classified equally well.

    Parameters
    ----------
    gained, lost : int
        Images that only the second and only the first gets right.

    Returns
    -------
    float
        1 where no image differs.

    References
    ----------
    McNemar 1947, Psychometrika 12:153; the exact form is a binomial test of the images that differ.
    """
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0

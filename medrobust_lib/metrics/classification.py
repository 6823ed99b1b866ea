"""Accuracy and calibration: pure functions of label, prediction and probability arrays.

Predictions may hold -1 for an abstention. An abstention is never correct and always stays in the
denominator.
"""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
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
    # The quantiles themselves: binomtest also works out a p-value, which takes most of a table's time.
    tail = (1 - confidence) / 2
    low = beta.ppf(tail, correct, n - correct + 1) if correct else 0.0
    high = beta.ppf(1 - tail, correct + 1, n - correct) if correct < n else 1.0
    return float(low), float(high)


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

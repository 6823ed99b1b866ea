"""Intervals of means and of differences over images."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from medrobust_lib.metrics import accuracy_interval

RESAMPLES = 2000
CONFIDENCE = 0.95


def mean_interval(values: ArrayLike, *, largest: float = 1.0, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over images, seeded.

    Parameters
    ----------
    values : float [n]
        One value an image.
    largest : float
        How far the value of one image could lie from that of the others: 1 for shares.
    seed : int

    Returns
    -------
    low, high : float
        Where all images have one value, a bootstrap knows no spread: then n images bound the share that could
        differ (Clopper-Pearson), and the interval reaches that share times ``largest`` to either side.

    References
    ----------
    Efron and Tibshirani 1993, chapter 13.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"an interval of a mean needs a vector of at least one value, got shape {array.shape}")
    if np.ptp(array) == 0:
        unseen = largest * accuracy_interval(0, len(array))[1]
        return float(array[0] - unseen), float(array[0] + unseen)
    found = stats.bootstrap(
        (array,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        batch=max(1, 10_000_000 // len(array)),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def share_interval(values: ArrayLike, *, seed: int = 0) -> tuple[float, float]:
    """`mean_interval` of values in [0, 1], kept within [0, 1]."""
    low, high = mean_interval(values, seed=seed)
    return max(low, 0.0), min(high, 1.0)


def difference_interval(first: tuple[float, float, float], second: tuple[float, float, float]) -> tuple[float, float]:
    """Interval of second minus first from the intervals of two independent results.

    Each limit takes up the squares of the distances of the two values from the limits that push it outwards.

    Parameters
    ----------
    first, second : tuple of float
        Value, low and high.

    Returns
    -------
    low, high : float

    References
    ----------
    Newcombe 1998, Statistics in Medicine 17:873, method 10, for proportions; Zou and Donner 2008, Statistics in
    Medicine 27:1693, for anything with intervals.
    """
    (a, a_low, a_high), (b, b_low, b_high) = first, second
    low = b - a - math.hypot(b - b_low, a_high - a)
    high = b - a + math.hypot(b_high - b, a - a_low)
    return low, high


def mcnemar_p(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Exact two-sided McNemar test of whether the same images are classified equally well.

    Parameters
    ----------
    first, second : bool [n]
        Whether each image is right in either run.

    Returns
    -------
    float
        1 where no image differs.

    References
    ----------
    McNemar 1947, Psychometrika 12:153; the exact form is a binomial test of the images that differ.
    """
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0

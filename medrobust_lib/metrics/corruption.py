"""Corruption errors: pure functions of arrays of errors.

Errors are fractions in [0, 1]. Every array function takes any leading axes, so that one call serves a model, a
table of models or the resamples of `bootstrap_interval`. Errors relative to a reference are in percent of it, as
the literature prints them: 100 is the reference itself, less is better.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEAST_RISE = 0.01  # a reference that loses less than a percentage point is no yardstick for what others lose
AGGREGATIONS = ("mean of ratios", "ratio of sums")
_ZERO = 1e-9  # what rounding may leave of a difference of zero


class GuardedMean(NamedTuple):
    """A mean over those corruptions for which the quantity is defined."""

    mean: NDArray[np.float64]  # [...]; NaN where no corruption is left
    left_out: NDArray[np.int64]  # [...]; number of corruptions left out


def corruption_error(errors: ArrayLike, reference_errors: ArrayLike) -> NDArray[np.float64]:
    """CE of each corruption: the error summed over severities, in percent of the reference model's.

    Parameters
    ----------
    errors : float [..., S] in [0, 1]
        Top-1 errors (or balanced errors); the last axis are the severities, without the clean images. Errors
        that are already means over severities have S = 1.
    reference_errors : float [..., S'] in [0, 1]
        Those of the reference model, for the same corruptions.

    Returns
    -------
    float64 [...], >= 0, in percent: 100 for the reference model
        NaN where the reference makes no error at all: there is nothing to compare with.

    Raises
    ------
    ValueError
        Values outside [0, 1], or corruptions that do not match.

    References
    ----------
    Hendrycks and Dietterich 2019, arXiv:1903.12261, section 4; Imam et al. 2025, arXiv:2505.15425, eq. 7.
    """
    return _percent_of(*_means_over_severities(errors, reference_errors))


def relative_clean_error(clean_error: ArrayLike, reference_clean_error: ArrayLike) -> NDArray[np.float64]:
    """Error on clean images in percent of the reference model's (the column "Clean" of published CE tables).

    Parameters
    ----------
    clean_error, reference_clean_error : float [...] in [0, 1]

    Returns
    -------
    float64 [...], in percent; NaN where the reference makes no error
    """
    return _percent_of(fractions("clean_error", clean_error), fractions("reference_clean_error", reference_clean_error))


def mean_corruption_error(
    errors: ArrayLike,
    reference_errors: ArrayLike,
    *,
    aggregation: Literal["mean of ratios", "ratio of sums"] = "mean of ratios",
) -> NDArray[np.float64]:
    """Mean corruption error (mCE): one number for all corruptions, in percent of the reference model.

    Parameters
    ----------
    errors, reference_errors : float [..., C, S] in [0, 1]
        As in `corruption_error`; the last axes are corruptions and severities.
    aggregation : {"mean of ratios", "ratio of sums"}
        The mean of the C corruption errors (the definition in the literature; corruptions at which the reference
        is good weigh most), or the ratio of the errors summed over all corruptions.

    Returns
    -------
    float64 [...], in percent: 100 for the reference model
        NaN where it is undefined: a single corruption without any error of the reference for the mean of
        ratios, no error at all for the ratio of sums.

    References
    ----------
    As for `corruption_error`; eq. 8 of Imam et al. is the mean of ratios.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r} is unknown; there are {' and '.join(map(repr, AGGREGATIONS))}")
    mean, reference = _means_over_severities(errors, reference_errors, corruptions=True)
    if aggregation == "ratio of sums":
        return _percent_of(mean.sum(-1), reference.sum(-1))
    return _percent_of(mean, reference).mean(-1)


def relative_corruption_error(
    errors: ArrayLike,
    clean_error: ArrayLike,
    reference_errors: ArrayLike,
    reference_clean_error: ArrayLike,
    *,
    least_rise: float = LEAST_RISE,
) -> NDArray[np.float64]:
    """Relative CE: what each corruption adds to the clean error, in percent of what it adds for the reference.

    A weak reference often loses nothing, or even gains, under a corruption. Its ratio then has a denominator of
    zero or below and a value without meaning, which the guard replaces by NaN.

    Parameters
    ----------
    errors, reference_errors : float [..., C, S] in [0, 1]
        As in `mean_corruption_error`.
    clean_error, reference_clean_error : float [...] in [0, 1]
        Errors on the clean images.
    least_rise : float
        Largest rise of the reference's error that does not count as one; ``-numpy.inf`` switches the guard off.

    Returns
    -------
    float64 [..., C], in percent
        Below 0 for a model that gains under a corruption at which the reference loses.

    References
    ----------
    Hendrycks and Dietterich 2019, arXiv:1903.12261, section 4 (relative mCE); the guard is ours.
    """
    mean, reference = _means_over_severities(errors, reference_errors, corruptions=True)
    rise = mean - fractions("clean_error", clean_error)[..., None]
    reference_rise = reference - fractions("reference_clean_error", reference_clean_error)[..., None]
    return _percent_of(rise, reference_rise, floor=least_rise)


def relative_mean_corruption_error(
    errors: ArrayLike,
    clean_error: ArrayLike,
    reference_errors: ArrayLike,
    reference_clean_error: ArrayLike,
    *,
    least_rise: float = LEAST_RISE,
) -> GuardedMean:
    """Relative mCE: the mean of `relative_corruption_error` over the corruptions that pass its guard.

    Parameters
    ----------
    errors, clean_error, reference_errors, reference_clean_error, least_rise
        As in `relative_corruption_error`.

    Returns
    -------
    GuardedMean
        ``mean`` float64 [...] in percent, and ``left_out`` int64 [...], to be reported beside it.
    """
    relative = relative_corruption_error(
        errors, clean_error, reference_errors, reference_clean_error, least_rise=least_rise
    )
    return _guarded_mean(relative)


def average_accuracy(errors: ArrayLike) -> NDArray[np.float64]:
    """Accuracy, averaged over severities and then over corruptions.

    Parameters
    ----------
    errors : float [..., C, S] in [0, 1]
        Without the clean images.

    Returns
    -------
    float64 [...] in [0, 1]
    """
    return 1 - fractions("errors", errors, least_axes=2).mean((-2, -1))


def degradation(errors: ArrayLike, clean_error: ArrayLike) -> NDArray[np.float64]:
    """Clean accuracy minus the average accuracy on corrupted images: what is lost, whatever a reference loses.

    Parameters
    ----------
    errors : float [..., C, S] in [0, 1]
    clean_error : float [...] in [0, 1]

    Returns
    -------
    float64 [...] in [-1, 1]; 0.1 is ten percentage points, negative if corruption helps
    """
    return 1 - fractions("clean_error", clean_error) - average_accuracy(errors)


def bootstrap_interval(
    statistic: Callable[..., NDArray[np.float64]],
    *correct: ArrayLike,
    rng: np.random.Generator,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval over images of any function of errors in this module.

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
    draws = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    errors = [
        np.clip(1 - (draws @ array.reshape(-1, n).T) / n, 0, 1).reshape(resamples, *array.shape[:-1])
        for array in arrays
    ]
    values = np.asarray(statistic(*errors))
    if values.shape != (resamples,):
        raise ValueError(f"the statistic must return {resamples} numbers, one a resample, got shape {values.shape}")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def fractions(name: str, values: ArrayLike, *, least_axes: int = 0) -> NDArray[np.float64]:
    """``values`` as an array, checked to lie in [0, 1] (a little rounding aside) and to have enough axes."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim < least_axes or array.size == 0:
        axes = "[..., corruptions, severities]" if least_axes == 2 else "[..., severities]"
        raise ValueError(f"{name} must have axes {axes}, got shape {array.shape}")
    outside = array[~((array >= -_ZERO) & (array <= 1 + _ZERO))]
    if outside.size:
        raise ValueError(f"{name} holds {outside[0]:g}: give fractions in [0, 1], not percent")
    return array


def _means_over_severities(
    errors: ArrayLike, reference_errors: ArrayLike, *, corruptions: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    least_axes = 2 if corruptions else 1
    mean = fractions("errors", errors, least_axes=least_axes).mean(-1)
    reference = fractions("reference_errors", reference_errors, least_axes=least_axes).mean(-1)
    # Other leading axes may broadcast; the corruptions must be the same ones.
    if mean.ndim and reference.ndim and mean.shape[-1] != reference.shape[-1]:
        raise ValueError(
            f"errors of {mean.shape[-1]} corruptions cannot be compared with a reference's of {reference.shape[-1]}"
        )
    return mean, reference


def _percent_of(
    values: NDArray[np.float64], reference: NDArray[np.float64], *, floor: float = 0.0
) -> NDArray[np.float64]:
    values, reference = np.broadcast_arrays(values, reference)
    with np.errstate(divide="ignore", invalid="ignore"):
        defined = (reference > floor + _ZERO) & (np.abs(reference) > _ZERO)
        return np.where(defined, 100 * values / reference, np.nan)[()]


def _guarded_mean(values: NDArray[np.float64]) -> GuardedMean:
    defined = ~np.isnan(values)
    count = defined.sum(-1)
    total = np.where(defined, values, 0).sum(-1)
    mean = np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)
    return GuardedMean(mean[()], values.shape[-1] - count)

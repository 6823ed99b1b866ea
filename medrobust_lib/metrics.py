"""What is measured: pure functions of label, prediction and probability arrays.

Predictions may hold -1 for an abstention. An abstention is never correct and always stays in the
denominator.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

CERTIFICATE_GROUPS = (
    "dataset", "model", "method", "guarantee", "sampling", "mode", "alpha", "seed", "n_classes", "sigma",
)  # fmt: skip
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
    """
    interval = binomtest(int(correct), int(n)).proportion_ci(confidence_level=confidence, method="exact")
    return float(interval.low), float(interval.high)


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


def certified_accuracy(rows: pd.DataFrame, radii: Sequence[float], *, per_class: bool = False) -> pd.DataFrame:
    """Share of all images that are classified correctly within at least a radius.

    Parameters
    ----------
    rows : DataFrame
        One row per image, sigma and method as `certify_dataset` returns them: columns label, predicted (-1:
        abstain), radius, and any of dataset, model, method, guarantee, sampling, mode, alpha, seed, n_classes
        and sigma, by which the table is grouped.
    radii : sequence of float
        L2 radii >= 0 in [0, 1] pixel units. A certificate counts if its radius is at least the one asked for.
    per_class : bool
        Also group by label.

    Returns
    -------
    DataFrame
        The grouping columns and radius, certified_accuracy, low, high (95 % Clopper-Pearson interval over
        images), n (all images, abstentions included), and chance (1 / n_classes) where n_classes is known.
        Between radii that sequential sampling was asked for the share is a lower bound; beyond the largest of
        them, up to what its draws could have certified (columns radius_tested and radius_reach), it is NaN.

    Raises
    ------
    ValueError
        Columns are missing, or a group holds an image twice.

    References
    ----------
    Cohen et al. 2019, arXiv:1902.02918, section 4.
    """
    groups = _certificate_groups(rows) + (["label"] if per_class else [])
    radii = [float(radius) for radius in radii]
    if not radii or not all(radius >= 0 for radius in radii):
        raise ValueError(f"radii={radii}: give at least one radius, all of them >= 0")
    table = []
    for key, group in rows.groupby(groups, sort=False, dropna=False):
        correct = (group["predicted"] == group["label"]).to_numpy()
        for radius in radii:
            hits = int((correct & (group["radius"] >= radius).to_numpy()).sum())
            low, high = accuracy_interval(hits, len(group))
            share = {"certified_accuracy": hits / len(group), "low": low, "high": high, "n": len(group)}
            if _not_tested(group, radius):
                share |= dict.fromkeys(("certified_accuracy", "low", "high"), float("nan"))
            table.append(dict(zip(groups, key, strict=True)) | {"radius": radius} | share)
    table = pd.DataFrame(table)
    return table.assign(chance=1 / table["n_classes"]).drop(columns="n_classes") if "n_classes" in table else table


def certification_summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per group of certificates: what a radius curve does not show.

    Parameters
    ----------
    rows : DataFrame
        As in `certified_accuracy`, with a column draws.

    Returns
    -------
    DataFrame
        The grouping columns and smoothed_accuracy with low and high (95 % interval), abstain_rate,
        average_certified_radius, majority_share (of the most frequent answer, abstentions left out; 1 for a
        constant classifier, NaN where all abstain), draws (mean per image), n, and chance.
    """
    groups = _certificate_groups(rows, "draws")
    table = []
    for key, group in rows.groupby(groups, sort=False, dropna=False):
        predicted, label = group["predicted"].to_numpy(), group["label"].to_numpy()
        answered = predicted[predicted >= 0]
        low, high = accuracy_interval(int((predicted == label).sum()), len(group))
        summary = {
            "smoothed_accuracy": accuracy(label, predicted),
            "low": low,
            "high": high,
            "abstain_rate": 1 - len(answered) / len(group),
            "average_certified_radius": average_certified_radius(group),
            "majority_share": majority_share(answered) if len(answered) else float("nan"),
            "draws": float(group["draws"].mean()),
            "n": len(group),
        }
        table.append(dict(zip(groups, key, strict=True)) | summary)
    table = pd.DataFrame(table)
    return table.assign(chance=1 / table["n_classes"]).drop(columns="n_classes") if "n_classes" in table else table


def average_certified_radius(rows: pd.DataFrame) -> float:
    """Mean over all images of the certified radius, 0 where the answer is wrong or an abstention.

    Parameters
    ----------
    rows : DataFrame
        Columns label, predicted, radius; rows of one method and one noise level. With sequential sampling
        radii are rounded down to those asked for, and so is their mean; the default grid of `certify` is fine.

    Returns
    -------
    float, >= 0, in [0, 1] pixel units

    References
    ----------
    Zhai et al. 2020 (MACER), arXiv:2001.02378, section 5.
    """
    if rows.empty:
        raise ValueError("there are no certificates to average over")
    mixed = [column for column in CERTIFICATE_GROUPS if column in rows.columns and rows[column].nunique() > 1]
    if mixed:
        raise ValueError(
            f"the certificates differ in {', '.join(mixed)}; an average over them means nothing, "
            "`certification_summary` averages each group"
        )
    return float(rows["radius"].where(rows["predicted"] == rows["label"], 0.0).mean())


def certified_envelope(table: pd.DataFrame) -> pd.DataFrame:
    """Best noise level for each radius: the convention of published tables, not a guarantee.

    A deployed classifier has one sigma, chosen before the image is seen; the maximum over sigma of certified
    accuracies is what no single certificate delivers.

    Parameters
    ----------
    table : DataFrame
        As `certified_accuracy` returns it, with several values of sigma.

    Returns
    -------
    DataFrame
        The rows of the best sigma per radius and group (the smallest sigma on ties), with a column convention.
    """
    if not {"sigma", "radius", "certified_accuracy"} <= set(table.columns):
        raise ValueError(f"an envelope needs columns sigma, radius and certified_accuracy, got {list(table.columns)}")
    values = {"sigma", "certified_accuracy", "low", "high", "n"}
    groups = [column for column in table.columns if column not in values]
    table = table.reset_index(drop=True)  # tables are often concatenated with repeating row numbers
    ordered = table.sort_values("sigma", kind="stable")
    ordered = ordered[ordered["certified_accuracy"].notna()]
    best = ordered.groupby(groups, sort=False, dropna=False)["certified_accuracy"].idxmax()
    return table.loc[best].sort_index().assign(convention="best sigma per radius").reset_index(drop=True)


def _not_tested(rows: pd.DataFrame, radius: float) -> bool:
    """Whether sequential sampling could have certified a radius but was not asked to."""
    if not {"radius_tested", "radius_reach"} <= set(rows.columns):
        return False
    return bool(((rows["radius_tested"] < radius) & (radius <= rows["radius_reach"])).any())


def _certificate_groups(rows: pd.DataFrame, *further: str) -> list[str]:
    missing = sorted({"label", "predicted", "radius", *further} - set(rows.columns))
    if missing or rows.empty:
        raise ValueError(f"no certificates to summarise: {len(rows)} rows, missing columns {missing}")
    if (rows["label"] < 0).any():
        raise ValueError("labels below 0: -1 stands for an abstention; an image needs its class, 0 to K-1")
    groups = [column for column in CERTIFICATE_GROUPS if column in rows.columns]
    if not groups:
        raise ValueError(f"certificates need at least one grouping column of {', '.join(CERTIFICATE_GROUPS)}")
    if "image" in rows.columns and rows.duplicated([*groups, "image"]).any():
        raise ValueError("an image occurs twice in one group of certificates; it would count double")
    return groups


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

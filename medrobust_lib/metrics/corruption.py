"""Corruption errors: pure functions of arrays of errors.

Errors are fractions in [0, 1]. Every array function takes any leading axes, so that one call serves a model, a
table of models or the resamples of `bootstrap_interval`. Errors relative to a reference are in percent of it, as
the literature prints them: 100 is the reference itself, less is better.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from medrobust_lib.checks import check_choice, suggest
from medrobust_lib.metrics.classification import CONSTANT_SHARE

LEAST_RISE = 0.01  # a reference that loses less than a percentage point is no yardstick for what others lose
AGGREGATIONS = ("mean of ratios", "ratio of sums")
_ZERO = 1e-9  # what rounding may leave of a difference of zero


class GuardedMean(NamedTuple):
    """A mean over those corruptions for which the quantity is defined."""

    mean: NDArray[np.float64]  # [...]; NaN where no corruption is left
    left_out: NDArray[np.int64]  # [...]; number of corruptions left out
    each: NDArray[np.float64]  # [..., C]; NaN where it is not defined


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
    check_choice("aggregation", aggregation, AGGREGATIONS)
    mean, reference = _means_over_severities(errors, reference_errors, corruptions=True)
    if aggregation == "ratio of sums":
        return _percent_of(mean.sum(-1), reference.sum(-1))
    return _percent_of(mean, reference).mean(-1)


def relative_mean_corruption_error(
    errors: ArrayLike,
    clean_error: ArrayLike,
    reference_errors: ArrayLike,
    reference_clean_error: ArrayLike,
    *,
    least_rise: float = LEAST_RISE,
) -> GuardedMean:
    """Relative mCE: what corruptions add to the clean error, in percent of what they add for the reference.

    A weak reference often loses nothing, or even gains, under a corruption. Its ratio then has a denominator of
    zero or below and a value without meaning, which the guard replaces by NaN and leaves out of the mean.

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
    GuardedMean
        ``mean`` float64 [...] in percent, over the corruptions that pass the guard; ``left_out`` int64 [...], to be
        reported beside it; and ``each`` float64 [..., C], the relative CE of every corruption in percent, below 0 for a
        model that gains under a corruption at which the reference loses.

    References
    ----------
    Hendrycks and Dietterich 2019, arXiv:1903.12261, section 4 (relative CE and mCE); the guard is ours.
    """
    mean, reference = _means_over_severities(errors, reference_errors, corruptions=True)
    rise = mean - fractions("clean_error", clean_error)[..., None]
    reference_rise = reference - fractions("reference_clean_error", reference_clean_error)[..., None]
    relative = _percent_of(rise, reference_rise, floor=least_rise)
    defined = np.ma.masked_invalid(relative)
    return GuardedMean(np.ma.filled(defined.mean(-1), np.nan)[()], np.isnan(relative).sum(-1), relative)


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


def corruption_error_table(
    table: pd.DataFrame,
    *,
    reference: str = "clip-vit-b16",
    measure: str = "accuracy",
    groups: Sequence[str] = ("dataset",),
    least_rise: float = LEAST_RISE,
) -> pd.DataFrame:
    """CE, mCE and what belongs beside them, for every model and data set.

    Parameters
    ----------
    table : DataFrame
        One row per data set, model, corruption and severity: the columns of ``groups``, model, corruption,
        severity (0: the clean images) and ``measure``; also read where present: n, and constant (bool) or
        majority_share (of the most frequent answer).
    reference : str
        Model relative to which errors are given; the papers' is OpenAI's CLIP ViT-B/16.
    measure : str
        Column of fractions in [0, 1]: accuracy or balanced_accuracy.
    groups : sequence of str
        Columns that name a data set.
    least_rise : float
        As in `relative_mean_corruption_error`.

    Returns
    -------
    DataFrame, one row per data set and model
        The columns of ``groups``, model, reference, n, clean_error (fraction), relative_clean_error,
        ce_<corruption> for each corruption, mce, ratio_of_sums, relative_mce (all in percent of the reference),
        relative_mce_left_out (corruptions that its guard left out), average_accuracy and degradation (fractions),
        and, where it can be known, constant (gives nearly one answer on clean images) and constant_share (of
        the sets, clean and corrupted, on which it does).

    Raises
    ------
    ValueError
        Unknown reference model, missing columns or cells, a cell twice, values outside [0, 1].
    """
    parts = []
    for key, cells in _cells(table, measure, groups):
        errors, clean_error, models, corruptions = _errors(cells, measure)
        if reference not in models:
            raise ValueError(f"no reference model {reference!r} for {key}.{suggest(reference, models)}")
        base, clean_base = errors[models.index(reference)], clean_error[models.index(reference)]
        relative = relative_mean_corruption_error(errors, clean_error, base, clean_base, least_rise=least_rise)
        columns = {
            **cells[[*groups]].iloc[0].to_dict(),
            "model": models,
            "reference": reference,
            **_number_of_images(cells, key),
            "clean_error": clean_error,
            "relative_clean_error": relative_clean_error(clean_error, clean_base),
            **{f"ce_{c}": ce for c, ce in zip(corruptions, corruption_error(errors, base).T, strict=True)},
            "mce": mean_corruption_error(errors, base),
            "ratio_of_sums": mean_corruption_error(errors, base, aggregation="ratio of sums"),
            "relative_mce": relative.mean,
            "relative_mce_left_out": relative.left_out,
            "average_accuracy": average_accuracy(errors),
            "degradation": degradation(errors, clean_error),
            **_constancy(cells, models),
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def corruption_error_layout(errors: pd.DataFrame, *, by: str = "model") -> pd.DataFrame:
    """Lay CE and mCE out as the papers print them: a row for each data set and model, then means over the data sets.

    Parameters
    ----------
    errors : DataFrame
        From `corruption_error_table`. Several rows of one data set and model, such as those of seeds, are averaged.
    by : str
        Column that names the models, or what else is compared.

    Returns
    -------
    DataFrame, indexed by dataset and ``by`` in the order of the table; the last data set is "mean"
        clean (the relative clean error), one column for each corruption, and mCE, all in percent of the reference. A
        mean over data sets leaves out those in which a value is not defined.

    References
    ----------
    Imam et al. 2025, arXiv:2505.15425, Table 2.
    """
    names = {name: name.removeprefix("ce_").replace("_", " ") for name in errors if name.startswith("ce_")}
    names = {"relative_clean_error": "clean", **names, "mce": "mCE"}
    rows = errors.groupby(["dataset", by], sort=False)[[*names]].mean().rename(columns=names)
    return pd.concat([rows, pd.concat({"mean": rows.groupby(by, sort=False).mean()}, names=["dataset"])])


def _cells(table: pd.DataFrame, measure: str, groups: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """Checked rows of each data set, under its name for messages."""
    needed = [*groups, "model", "corruption", "severity", measure]
    missing = [column for column in needed if column not in table.columns]
    if missing or table.empty:
        raise ValueError(f"no accuracies to summarise: {len(table)} rows, missing columns {missing}")
    fractions(measure, table[measure].dropna())
    keys = [*groups, "model", "corruption", "severity"]
    # Clean images may be listed once a model, or once again beside each corruption.
    rows = table.assign(corruption=table["corruption"].where(table["severity"] != 0, "clean"))
    rows = rows.drop_duplicates([*keys, measure])
    twice = rows[rows.duplicated(keys)]
    if len(twice):
        raise ValueError(
            f"two different values of {measure} for {', '.join(f'{k}={twice.iloc[0][k]}' for k in keys)}; "
            "give one row per data set, model, corruption and severity"
        )
    return [(" ".join(map(str, key)), cells) for key, cells in rows.groupby(list(groups), sort=False, dropna=False)]


def _errors(cells: pd.DataFrame, measure: str) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str], list[str]]:
    """Errors [M, C, S], clean errors [M], and the names of the M models and C corruptions of one data set."""
    models = list(cells["model"].unique())
    corrupted = cells[cells["severity"] != 0]
    corruptions, severities = list(corrupted["corruption"].unique()), sorted(corrupted["severity"].unique())
    if not corruptions:
        raise ValueError("the table holds clean images only (severity 0); corruption errors need corrupted ones")
    columns = pd.MultiIndex.from_tuples([("clean", 0), *((c, s) for c in corruptions for s in severities)])
    wide = cells.pivot(index="model", columns=["corruption", "severity"], values=measure)
    wide = wide.reindex(index=models, columns=columns)
    lacking = wide.isna()
    if lacking.to_numpy().any():
        model = lacking.any(axis="columns").idxmax()
        where = [f"{c} at severity {s}" if s else "the clean images" for c, s in columns[lacking.loc[model]]]
        more = f" and {len(where) - 5} more" if len(where) > 5 else ""
        raise ValueError(
            f"model {model!r} lacks {', '.join(where[:5])}{more}; every model needs every corruption and severity"
        )
    error = 1 - wide.to_numpy()
    shape = (len(models), len(corruptions), len(severities))
    return error[:, 1:].reshape(shape), error[:, 0], models, corruptions


def _number_of_images(cells: pd.DataFrame, key: str) -> dict[str, int]:
    if "n" not in cells:
        return {}
    sizes = cells["n"].unique()
    if len(sizes) > 1:
        raise ValueError(f"{key} has cells of {sorted(map(int, sizes))} images; compare models on the same images")
    return {"n": int(sizes[0])}


def _constancy(cells: pd.DataFrame, models: list[str]) -> dict[str, NDArray[np.generic]]:
    if not {"constant", "majority_share"} & {*cells}:
        return {}
    constant = cells["constant"].astype(bool) if "constant" in cells else cells["majority_share"] >= CONSTANT_SHARE
    cells = cells.assign(constant=constant)  # tables that were put together repeat their index
    clean = cells[cells["severity"] == 0].groupby("model")["constant"].first()
    return {
        "constant": clean.loc[models].to_numpy(),
        "constant_share": cells.groupby("model")["constant"].mean().loc[models].to_numpy(),
    }

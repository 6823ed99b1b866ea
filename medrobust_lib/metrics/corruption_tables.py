"""Corruption errors of tidy tables: one row per data set, model, corruption and severity in, one per model out."""

from collections.abc import Sequence
from difflib import get_close_matches

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medrobust_lib.metrics.classification import CONSTANT_SHARE
from medrobust_lib.metrics.corruption import (
    LEAST_RISE,
    average_accuracy,
    corruption_error,
    degradation,
    fractions,
    mean_corruption_error,
    relative_clean_error,
    relative_corruption_error,
    relative_mean_corruption_error,
)


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
        As in `relative_corruption_error`.

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
            close = get_close_matches(reference, models, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"no reference model {reference!r} for {key}.{hint} Models there: {', '.join(models)}")
        base, clean_base = errors[models.index(reference)], clean_error[models.index(reference)]
        relative = relative_mean_corruption_error(errors, clean_error, base, clean_base, least_rise=least_rise)
        parts.append(
            pd.DataFrame(
                {
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
            )
        )
    return pd.concat(parts, ignore_index=True)


def balanced_error_table(
    table: pd.DataFrame, baseline: pd.DataFrame, *, least_rise: float = LEAST_RISE
) -> pd.DataFrame:
    """Balanced errors as MedMNIST-C reports them, normalised by a baseline's (AlexNet's).

    Parameters
    ----------
    table : DataFrame
        As for `corruption_error_table`, with the columns dataset and balanced_accuracy.
    baseline : DataFrame
        Columns dataset, corruption ("clean" among them) and balanced_error (fraction, mean over severities), for
        instance ``load_published("medmnist_c_alexnet")``.
    least_rise : float
        Largest rise of the baseline's error for which rbe is NaN; ``-numpy.inf`` gives what the authors' evaluator
        gives (for PneumoniaMNIST, AlexNet's balanced error is smaller at higher contrast or gamma than on clean
        images).

    Returns
    -------
    DataFrame, one row per data set, model and corruption
        dataset, model, corruption, balanced_error (fraction, mean over severities), be and rbe: the balanced
        error, and its rise over the clean one, as multiples of the baseline's (1: as AlexNet; not percent, as in
        the source). The means of be and rbe over the corruptions are a data set's BE and rBE.

    Raises
    ------
    ValueError
        As for `corruption_error_table`, or a data set or corruption that the baseline lacks.

    References
    ----------
    Di Salvo et al. 2024, MedMNIST-C, arXiv:2406.17536.
    """
    known = baseline.set_index(["dataset", "corruption"])["balanced_error"]
    parts = []
    for key, cells in _cells(table, "balanced_accuracy", ("dataset",)):
        errors, clean_error, models, corruptions = _errors(cells, "balanced_accuracy")
        dataset = cells["dataset"].iloc[0]
        wanted = pd.MultiIndex.from_product([[dataset], ["clean", *corruptions]])
        missing = [corruption for _, corruption in wanted.difference(known.index)]
        if missing:
            raise ValueError(
                f"the baseline has no error for {', '.join(sorted(missing))} of {key}; it knows the data sets "
                f"{', '.join(map(str, baseline['dataset'].unique()))}"
            )
        clean_base, *base = known.loc[wanted]
        base = np.array(base)[:, None]
        relative = relative_corruption_error(errors, clean_error, base, clean_base, least_rise=least_rise)
        parts.append(
            pd.DataFrame(
                {
                    "dataset": dataset,
                    "model": np.repeat(models, len(corruptions)),
                    "corruption": np.tile(corruptions, len(models)),
                    "balanced_error": errors.mean(-1).ravel(),
                    "be": corruption_error(errors, base).ravel() / 100,
                    "rbe": relative.ravel() / 100,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


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
    if "constant" in cells:
        constant = cells["constant"].astype(bool)
    elif "majority_share" in cells:
        constant = cells["majority_share"] >= CONSTANT_SHARE
    else:
        return {}
    flags = pd.DataFrame({"model": cells["model"], "constant": constant})
    clean = flags[cells["severity"] == 0].set_index("model")["constant"]
    return {
        "constant": clean.loc[models].to_numpy(),
        "constant_share": flags.groupby("model")["constant"].mean().loc[models].to_numpy(),
    }

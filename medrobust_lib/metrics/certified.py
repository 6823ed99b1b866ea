"""Certified accuracy: pure functions of tables of certificates, one row per image, sigma and method."""

from collections.abc import Sequence

import pandas as pd

from medrobust_lib.metrics.classification import accuracy, accuracy_interval, majority_share

CERTIFICATE_GROUPS = (
    "dataset", "model", "method", "guarantee", "sampling", "mode", "alpha", "seed", "n_classes", "sigma",
)  # fmt: skip


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

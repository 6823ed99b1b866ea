"""Certified accuracy: pure functions of tables of certificates, one row per image, sigma and method."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from medrobust_lib.metrics.classification import accuracy, accuracy_interval, majority_share, share_interval

CERTIFICATE_GROUPS = (
    "dataset", "model", "method", "guarantee", "sampling", "mode", "alpha", "seed", "prompt_seed", "n_classes",
    "perturbation", "sigma",
)  # fmt: skip
# What a row measures; all other columns say of what.
MEASURED = frozenset(
    {"certified_accuracy", "clean_accuracy", "low", "high", "lowest", "highest", "seeds", "n", "patients"}
    | {"radius_reach"}
)


def certified_accuracy(rows: pd.DataFrame, radii: Sequence[float], *, per_class: bool = False) -> pd.DataFrame:
    """Share of all images that are classified correctly within at least a radius.

    Parameters
    ----------
    rows : DataFrame
        One row per image, sigma and method as `certify_dataset` returns them: columns label, predicted (-1:
        abstain), radius, and any of dataset, model, method, guarantee, sampling, mode, alpha, seed, prompt_seed (which
        methods may be ``about``), n_classes, perturbation and sigma, by which the table is grouped.
    radii : sequence of float
        Radii >= 0 in the units of sigma: for pixel noise L2 radii in [0, 1] pixel units. A certificate counts if its
        radius is at least the one asked for.
    per_class : bool
        Also group by label.

    Returns
    -------
    DataFrame
        The grouping columns and radius, certified_accuracy, low, high (95 % interval over images, or over patients
        where the rows have a column patient: `share_interval`), n (all images, abstentions included), patients (their
        number, where known), radius_reach (the largest radius that the draws can
        certify) where the rows have it, and chance (1 / n_classes) where n_classes is known.
        Beyond the reach the share is NaN: 0 would speak of the draws and not of the classifier. Between radii
        that sequential sampling was asked for (up to radius_tested in the rows) it is a lower bound, beyond the
        largest of them NaN.

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
        for radius in radii:
            # An abstention, -1, is never the label; it stays in the denominator.
            hits = (group["predicted"] == group["label"]) & (group["radius"] >= radius)
            low, high = share_interval(hits, groups=group.get("patient", ()))
            share = {"certified_accuracy": hits.mean(), "low": low, "high": high, "n": len(group)}
            share |= {"patients": group["patient"].nunique()} if "patient" in group else {}
            if _unknown(group, radius):
                share |= dict.fromkeys(("certified_accuracy", "low", "high"), float("nan"))
            if "radius_reach" in group:
                share["radius_reach"] = group["radius_reach"].max()
            table.append(dict(zip(groups, key, strict=True)) | {"radius": radius} | share)
    return _with_chance(table)


def balanced_certified_accuracy(rows: pd.DataFrame, radii: Sequence[float]) -> pd.DataFrame:
    """Certified accuracy beside its mean over classes, of which a constant answer gets one share in all.

    Parameters
    ----------
    rows, radii
        As in `certified_accuracy`.

    Returns
    -------
    DataFrame
        The table of `certified_accuracy` (low and high belong to its plain share) and the columns balanced (mean
        over the classes that occur of their certified accuracy; at most 1 / classes for a constant answer),
        classes_certified (how many of them have a certified image) and classes (how many occur). Where one
        class was not tested at a radius, or the draws do not reach it, balanced and classes_certified are missing.

    Raises
    ------
    ValueError
        As `certified_accuracy`.
    """
    radii = list(dict.fromkeys(radii))  # a radius asked for twice would count each class twice
    plain = certified_accuracy(rows, radii)
    keys = [column for column in plain.columns if column not in MEASURED]
    by_class = certified_accuracy(rows, radii, per_class=True).groupby(keys, sort=False, dropna=False)
    added = by_class["certified_accuracy"].agg(
        balanced=lambda shares: shares.mean(skipna=False),
        classes_certified=lambda shares: (shares > 0).sum() if shares.notna().all() else float("nan"),
        classes="size",
    )
    table = plain.merge(added.reset_index(), on=keys, how="left", validate="one_to_one")
    return table.astype({"classes_certified": "Int64"})


def over_prompt_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Summarise certified accuracy over the seeds that prompts were learned with.

    Two uncertainties stand side by side: other seeds (lowest to highest) and other images (low to high).

    Parameters
    ----------
    table : DataFrame
        As `certified_accuracy` returns it, with a column prompt_seed; rows that agree in all columns but
        prompt_seed and what is measured form a group. Every seed of a group was measured on the same images.

    Returns
    -------
    DataFrame
        The grouping columns and certified_accuracy (mean over the seeds), lowest and highest (of the seeds; not
        an interval), low and high (95 % Clopper-Pearson interval of the mean number of certified images out
        of n, rounded outwards: how far other images would move the mean of these very prompts), seeds (their
        number; one of them has no spread, which says nothing about other seeds), n (images), and radius_reach
        where the table has it. Where one seed was not tested at a radius, or the draws do not reach it, all shares
        are NaN.

    Raises
    ------
    ValueError
        Columns are missing, a seed occurs twice in a group, or its seeds were measured on different numbers of
        images.
    """
    _require(table, "method", "sigma", "radius", "prompt_seed", "certified_accuracy", "n")
    keys = [column for column in table.columns if column not in MEASURED | {"prompt_seed"}]
    if table.duplicated([*keys, "prompt_seed"]).any():
        repeated = table[table.duplicated([*keys, "prompt_seed"])].iloc[0]
        raise ValueError(
            f"prompt seed {repeated['prompt_seed']} occurs twice for {repeated['method']!r} at sigma "
            f"{repeated['sigma']} and radius {repeated['radius']:g}"
        )
    summary = []
    for key, group in table.groupby(keys, sort=False, dropna=False):
        shares, images = group["certified_accuracy"], group["n"].unique()
        if len(images) > 1:
            raise ValueError(
                f"the seeds of {group['method'].iloc[0]!r} at sigma {group['sigma'].iloc[0]} were measured on "
                f"{', '.join(map(str, images))} images; their mean would compare nothing, summarise them separately"
            )
        n = int(images[0])
        lowest, highest = shares.min(skipna=False), shares.max(skipna=False)
        values = {"certified_accuracy": shares.mean(skipna=False), "lowest": lowest, "highest": highest}
        values |= dict.fromkeys(("low", "high"), float("nan"))
        if shares.notna().all():
            hits = int((shares * n).round().sum())
            values["low"], _ = accuracy_interval(hits // len(group), n)
            _, values["high"] = accuracy_interval(-(-hits // len(group)), n)
            if "patients" in group and (group["patients"] < n).any():  # each seed's interval knows its patients
                values |= {"low": group["low"].mean(), "high": group["high"].mean()}
        if "radius_reach" in group:
            values["radius_reach"] = group["radius_reach"].max()
        summary.append(dict(zip(keys, key, strict=True)) | values | {"seeds": len(group), "n": n})
    return pd.DataFrame(summary)


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
        low, high = share_interval(predicted == label, groups=group.get("patient", ()))
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
    return _with_chance(table)


def average_certified_radius(rows: pd.DataFrame) -> float:
    """Mean over all images of the certified radius, 0 where the answer is wrong or an abstention.

    Parameters
    ----------
    rows : DataFrame
        Columns label, predicted, radius; rows of one method and one noise level. With sequential sampling
        radii are rounded down to those asked for, and so is their mean; the default grid of `certify` is fine.

    Returns
    -------
    float, >= 0, in the units of the perturbation

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
        As `certified_accuracy` or `over_prompt_seeds` returns it, with several values of sigma, which may
        differ from method to method. Missing shares take no part: the draws do not reach the radius, or were not
        tested at it.

    Returns
    -------
    DataFrame
        The rows of the best sigma per radius and group (the smallest sigma on ties), with the columns
        clean_accuracy (certified accuracy at radius 0 and the same sigma, NaN where it was not asked for)
        and convention. A group has no row where no noise level reaches the radius or was tested at it.

    Raises
    ------
    ValueError
        Columns are missing, or one group has several levels of several parameters (texts such as "0.5 and 0.2"): its
        radii count standard deviations, so that at another level the same radius is another region.
    """
    _require(table, "sigma", "radius", "certified_accuracy")
    groups = [column for column in table.columns if column not in MEASURED | {"sigma"}]
    table = table.reset_index(drop=True)  # tables are often concatenated with repeating row numbers
    texts = table[table["sigma"].map(lambda sigma: isinstance(sigma, str))]
    if (texts.groupby(groups, dropna=False)["sigma"].nunique() > 1).any():
        raise ValueError(
            f"sigma {', '.join(map(repr, texts['sigma'].unique()))}: radii of several parameters count standard "
            "deviations and are other regions at another sigma, so none is the best; give one sigma at a time"
        )
    others = [column for column in (*groups, "sigma") if column != "radius"]
    clean = table.loc[table["radius"] == 0, [*others, "certified_accuracy"]].drop_duplicates(others)
    clean = clean.rename(columns={"certified_accuracy": "clean_accuracy"})
    table = table.drop(columns="clean_accuracy", errors="ignore").merge(clean, on=others, how="left")
    numbers = pd.to_numeric(table["sigma"], errors="coerce")  # texts stand alone in their groups
    ordered = table.loc[numbers.sort_values(kind="stable").index]
    ordered = ordered[ordered["certified_accuracy"].notna()]
    best = ordered.groupby(groups, sort=False, dropna=False)["certified_accuracy"].idxmax()
    return table.loc[best].sort_index().assign(convention="best sigma per radius").reset_index(drop=True)


def table_of_radii(table: pd.DataFrame, radii: Sequence[float]) -> pd.DataFrame:
    """Lay certified accuracy out for reading, as published tables do: method x radius, the best sigma for each.

    The numbers are those of `certified_envelope`, which keeps them as numbers, one a row.

    Parameters
    ----------
    table : DataFrame
        As in `certified_envelope`, of one model, data set and perturbation, with columns method, guarantee and
        radius_reach and with the radius 0, whose certified accuracy is called clean. Methods may differ in noise
        levels, radii and n.
    radii : sequence of float
        Which radii to show, in the units of sigma.

    Returns
    -------
    DataFrame of str
        Index (method, guarantee) in the order of the table, a column per radius. A cell reads
        "certified (clean)" in percent, clean at the sigma that won; "–" where no noise level reaches the
        radius, and nothing where it was not measured.

    Raises
    ------
    ValueError
        Columns or radii are missing, rows occur twice (for instance of two data sets), or several perturbations.
    """
    keys = ["method", "guarantee", "sigma", "radius"]
    _require(table, *keys, "certified_accuracy", "radius_reach")
    missing = sorted({0.0, *radii} - set(table["radius"]))
    if missing:
        raise ValueError(
            f"the table has no radius {', '.join(f'{radius:g}' for radius in missing)} (0 gives the clean "
            f"accuracy); it has {', '.join(f'{radius:g}' for radius in sorted(set(table['radius'])))}"
        )
    if table.duplicated(keys).any():
        mixed = [column for column in table.columns if column not in MEASURED | {*keys} and table[column].nunique() > 1]
        raise ValueError(f"rows occur twice for one {', '.join(keys)}; give one at a time of: {', '.join(mixed)}")
    if "perturbation" in table and table["perturbation"].nunique() > 1:
        names = ", ".join(table["perturbation"].unique())
        raise ValueError(f"radii of {names} are in units of their own; give one perturbation at a time")
    best = certified_envelope(table[[*keys, "certified_accuracy"]])
    texts = [
        f"{100 * share:.1f} ({'not measured' if pd.isna(clean) else f'{100 * clean:.1f}'})"
        for share, clean in zip(best["certified_accuracy"], best["clean_accuracy"], strict=True)
    ]
    index = pd.MultiIndex.from_frame(table[["method", "guarantee"]].drop_duplicates())
    cells = best.assign(text=texts).set_index(["method", "guarantee", "radius"])["text"].unstack("radius")
    within = table.assign(within=table["radius"] <= table["radius_reach"])
    within = within.groupby(["method", "guarantee", "radius"])["within"].any()
    beyond = within.eq(False).unstack("radius", fill_value=False)
    columns = list(dict.fromkeys(radii))
    cells, beyond = (part.reindex(index=index, columns=columns) for part in (cells, beyond))
    cells = cells.astype(object).mask(beyond.eq(True), "–").fillna("")
    return cells.rename(columns="{:g}".format).rename_axis(columns="radius")


def _with_chance(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Table of rows, with the accuracy of a blind guess instead of the number of classes."""
    table = pd.DataFrame(rows)
    return table.assign(chance=1 / table["n_classes"]).drop(columns="n_classes") if "n_classes" in table else table


def _require(table: pd.DataFrame, *columns: str) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"the table has no column {', '.join(missing)}; its columns are {', '.join(table.columns)}")


def _unknown(rows: pd.DataFrame, radius: float) -> bool:
    """Whether no draws reach a radius, or sequential sampling could have certified it but was not asked to."""
    if "radius_reach" not in rows:
        return False
    reach = rows["radius_reach"]
    tested = rows.get("radius_tested", reach)
    return bool(radius > reach.max() or ((tested < radius) & (radius <= reach)).any())


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

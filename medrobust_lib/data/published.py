"""The papers' own tables, shipped as tidy CSV for comparison, and whether RobustMedCLIP's follow from each other.

Nothing here measures a model: the question is only whether printed numbers fit each other, what they can say, and what
other choices would change.
"""

from importlib.resources import files

import pandas as pd

from medrobust_lib.checks import check_choice
from medrobust_lib.metrics import corruption_error_table, relative_clean_error

_FOLDER = files("medrobust_lib.data") / "published"
REFERENCE = "CLIP"  # the paper's reference: zero-shot CLIP ViT-B/16
TOLERANCE = 0.1  # percent; a percentage printed with one decimal, of accuracies printed with two, may be off by that
MEAN_OF_MODELS = "mean of models"
_LEAST_COLUMNS = 4  # of eight, that equal the share of a class
_ROUNDING = 0.00005  # of fractions printed with four decimals
_SETS = ["collection", "dataset"]
_ROWS = (*_SETS, "model")
_COLUMNS = ["source", *_SETS, "model", "entry", "printed", "recomputed"]


def list_published() -> tuple[str, ...]:
    """Names that `load_published` accepts, sorted."""
    return tuple(sorted(path.name.removesuffix(".csv") for path in _FOLDER.iterdir() if path.name.endswith(".csv")))


def load_published(name: str) -> pd.DataFrame:
    """One table as its paper reports it; nothing in it was measured by this project.

    Parameters
    ----------
    name : str
        ``promptsmooth_table2`` and ``_table3`` (certified and clean accuracy), ``_table4`` (initial
        context), ``_table5`` (times); ``robustmedclip_table2_mce``, ``robustmedclip_table3_accuracy``,
        ``robustmedclip_table3_average``, ``robustmedclip_table6`` (few-shot variants),
        ``robustmedclip_readme`` (summary in the authors' repository); ``smoothing_vlms_draws`` (seconds and ratios of
        100 and 1000 draws, from the text); ``medmnist_c_alexnet`` (balanced errors
        by which MedMNIST-C normalises; rounded to six decimals); ``tss_imagenet`` (certified robust accuracy under
        brightness, from the results TSS's authors released); ``test_class_counts`` (images of each class
        in the test splits of RobustMedCLIP's data sets, PBC's not among them).

    Returns
    -------
    pandas.DataFrame
        One observation a row; the columns ``status`` (always "reported"), ``paper`` and ``table`` say
        where it stands. Accuracies, errors and shares are fractions in [0, 1]; columns ending in
        ``percent_of_clip`` are errors in percent of zero-shot CLIP's error, as printed (100 = CLIP);
        radii are L2 in [0, 1] pixel units at 224 x 224; times are seconds unless the name says hours.
        Every number stands as printed, those too that do not fit the others: Table 6 of RobustMedCLIP prints
        a clean error of 103.1 for the ResNet at 3 %, where its accuracy of 12.81 % gives 106.1.
        `medrobust_lib.data.published.entries_that_do_not_fit` lists them.

    Raises
    ------
    ValueError
        Unknown name.

    References
    ----------
    Hussein et al., PromptSmooth, MICCAI 2024. Imam et al., On the Robustness of Medical Vision-Language
    Models: Are they Truly Generalizable?, MIUA 2025 (arXiv 2505.15425v2).
    Di Salvo et al., MedMNIST-C, 2024 (arXiv 2406.17536; package medmnistc 0.1.0).
    """
    check_choice("published table", name, list_published())
    with (_FOLDER / f"{name}.csv").open(encoding="utf-8") as stream:
        return pd.read_csv(stream, dtype={"table": "string"})


def published_corruption_errors(accuracies: pd.DataFrame | None = None, *, reference: str = REFERENCE) -> pd.DataFrame:
    """CE, mCE and the rest of every block, from the accuracies of RobustMedCLIP's Table 3.

    Parameters
    ----------
    accuracies : DataFrame or None
        Columns collection, dataset, model, corruption ("clean" among them) and accuracy (fraction, mean over
        severities); None for ``load_published("robustmedclip_table3_accuracy")``.
    reference : str
        Model relative to which errors are given, or "mean of models": an imagined one whose accuracies are the
        means of the others'.

    Returns
    -------
    DataFrame
        As from `medrobust_lib.metrics.corruption_error_table`, one row per data set and model.
    """
    if accuracies is None:
        accuracies = load_published("robustmedclip_table3_accuracy")
    cells = accuracies[[*_SETS, "model", "corruption", "accuracy"]]
    if reference == MEAN_OF_MODELS:
        mean = cells.groupby([*_SETS, "corruption"], sort=False, as_index=False)["accuracy"].mean()
        cells = pd.concat([cells, mean.assign(model=MEAN_OF_MODELS)], ignore_index=True)
    # Means over five severities are printed, not the severities: one stands for all.
    cells = cells.assign(severity=(cells["corruption"] != "clean").astype(int))
    table = corruption_error_table(cells, reference=reference, groups=_SETS)
    return table[table["model"] != MEAN_OF_MODELS].reset_index(drop=True)


def recompute_published(accuracies: pd.DataFrame | None = None) -> pd.DataFrame:
    """Every printed number that follows from the accuracies of Table 3 (or of its own row), beside its recomputation.

    Parameters
    ----------
    accuracies : DataFrame or None
        As in `published_corruption_errors`.

    Returns
    -------
    DataFrame
        source ("Table 2", "Table 3", "Table 6" or "README"), collection, dataset, model, entry, printed and
        recomputed (errors in percent of CLIP's, accuracies in percent), deviation (recomputed minus printed) and
        fits (up to `TOLERANCE`). Table 2 has 450 entries, Table 3's averages 50; of Table 6 the clean errors, which
        follow from the accuracies beside them, and what the variant shared with the other tables repeats; of the
        README the means over all ten data sets.
    """
    errors = published_corruption_errors(accuracies)
    table = pd.concat([_table_2(errors), _table_3(errors), _table_6(errors), _readme(errors)], ignore_index=True)
    table["deviation"] = table["recomputed"] - table["printed"]
    table["fits"] = table["deviation"].abs() <= TOLERANCE + 1e-9
    return table


def rows_of_table_2(accuracies: pd.DataFrame | None = None) -> pd.DataFrame:
    """The 50 rows of Table 2: printed and recomputed mCE, and the largest deviation of the row's nine numbers.

    Parameters
    ----------
    accuracies : DataFrame or None
        As in `published_corruption_errors`.

    Returns
    -------
    DataFrame with columns collection, dataset, model, printed, recomputed, largest_deviation, fits
    """
    table = recompute_published(accuracies).query("source == 'Table 2'")
    rows = table[table["entry"] == "mCE"].set_index([*_ROWS])[["printed", "recomputed"]]
    of_row = table.assign(deviation=table["deviation"].abs()).groupby([*_ROWS], sort=False)
    return rows.assign(largest_deviation=of_row["deviation"].max(), fits=of_row["fits"].all()).reset_index()


def entries_that_do_not_fit(accuracies: pd.DataFrame | None = None) -> pd.DataFrame:
    """The printed numbers that the accuracies do not give: the rows of `recompute_published` beyond the tolerance.

    Parameters
    ----------
    accuracies : DataFrame or None
        As in `published_corruption_errors`.

    Returns
    -------
    DataFrame, as from `recompute_published` without the column fits
    """
    table = recompute_published(accuracies)
    return table[~table["fits"]].drop(columns="fits").reset_index(drop=True)


def constant_predictors(accuracies: pd.DataFrame | None = None) -> pd.DataFrame:
    """Rows of accuracies that a classifier with one and the same answer for every image would print.

    A row is listed if its clean accuracy, and that under three corruptions at least (half of the columns), equal the
    share of one and the same class in the test split, to the printed precision. Accuracies are means over five
    severities, so that several columns hardly agree with a share by chance. PBC, whose class counts are not
    published, is not judged.

    Parameters
    ----------
    accuracies : DataFrame or None
        As in `published_corruption_errors`.

    Returns
    -------
    DataFrame
        collection, dataset, model, class (several if they are equally large), count, n, share, columns_at_share,
        columns, every_column, elsewhere (the other columns), largest_deviation (of any column from the share), mce
        and rank_by_mce (1 is best of the data set's models).
    """
    if accuracies is None:
        accuracies = load_published("robustmedclip_table3_accuracy")
    class_counts = load_published("test_class_counts")
    class_counts["n"] = class_counts.groupby(_SETS)["images"].transform("sum")
    classes = class_counts.rename(columns={"images": "count"}).groupby([*_SETS, "count", "n"], sort=False)
    classes = classes["class"].agg(" or ".join).reset_index()
    classes["share"] = classes["count"] / classes["n"]
    cells = accuracies.merge(classes, on=_SETS)
    cells["deviation"] = (cells["accuracy"] - cells["share"]).abs()
    cells["at_share"] = cells["deviation"] <= _ROUNDING + 1e-9
    keys = [*_ROWS, "class", "count", "n", "share"]
    cells["clean"] = cells["at_share"] & (cells["corruption"] == "clean")
    cells["elsewhere"] = cells["corruption"].where(~cells["at_share"], "")
    rows = cells.groupby(keys, sort=False, as_index=False).agg(
        clean=("clean", "any"),
        columns_at_share=("at_share", "sum"),
        columns=("at_share", "size"),
        every_column=("at_share", "all"),
        elsewhere=("elsewhere", lambda names: ", ".join(filter(None, names))),
        largest_deviation=("deviation", "max"),
    )
    rows = rows[rows["clean"] & (rows["columns_at_share"] >= _LEAST_COLUMNS)].drop(columns="clean")
    errors = published_corruption_errors(accuracies)
    errors["rank_by_mce"] = _rank(errors, _SETS)
    return rows.merge(errors[[*_ROWS, "mce", "rank_by_mce"]], on=[*_ROWS])


def rankings_by_choice(accuracies: pd.DataFrame | None = None) -> pd.DataFrame:
    """How the models would rank under other ways of aggregating, and relative to other references.

    Within one data set the ratio of sums ranks alike for every reference, since that divides by one number; means
    of ratios, over corruptions and over data sets, weigh by where the reference is good.

    Parameters
    ----------
    accuracies : DataFrame or None
        As in `published_corruption_errors`.

    Returns
    -------
    DataFrame
        reference, aggregation, collection, dataset ("mean of 5", and "all" with "mean of 10", for means over
        data sets), model, mce (percent of the reference), rank (1 is best), paper_rank (the paper's choice: mean of
        ratios relative to CLIP) and moved (places lost; negative: gained).
    """
    parts = []
    for reference in (REFERENCE, "BioMedCLIP", MEAN_OF_MODELS):
        errors = published_corruption_errors(accuracies, reference=reference)
        for aggregation, column in (("mean of ratios", "mce"), ("ratio of sums", "ratio_of_sums")):
            one = errors[[*_ROWS]].assign(mce=errors[column])
            collections = one.groupby(["collection", "model"], sort=False, as_index=False)["mce"].mean()
            overall = one.groupby("model", sort=False, as_index=False)["mce"].mean()
            means = collections.assign(dataset="mean of 5"), overall.assign(collection="all", dataset="mean of 10")
            parts += [part.assign(reference=reference, aggregation=aggregation) for part in (one, *means)]
    table = pd.concat(parts, ignore_index=True)
    table["rank"] = _rank(table, ["reference", "aggregation", *_SETS])
    as_printed = table[(table["reference"] == REFERENCE) & (table["aggregation"] == "mean of ratios")]
    paper = as_printed.set_index([*_ROWS])["rank"].rename("paper_rank")
    table = table.join(paper, on=[*_ROWS])
    table["moved"] = table["rank"] - table["paper_rank"]
    return table[["reference", "aggregation", *_SETS, "model", "mce", "rank", "paper_rank", "moved"]]


def _rank(table: pd.DataFrame, groups: list[str]) -> pd.Series:
    # Errors that differ by less than rounding share a rank.
    return table["mce"].round(6).groupby([table[name] for name in groups]).rank(method="min").astype(int)


def _table_2(errors: pd.DataFrame) -> pd.DataFrame:
    names = {"relative_clean_error": "clean error", "mce": "mCE"}
    names |= {c: f"CE, {c.removeprefix('ce_')}" for c in errors if c.startswith("ce_")}
    recomputed = errors.rename(columns=names).melt(
        [*_ROWS], [*names.values()], var_name="entry", value_name="recomputed"
    )
    printed = load_published("robustmedclip_table2_mce")
    entry = printed["measure"].replace({"mean corruption error": "mCE"})
    printed["entry"] = entry.where(entry != "corruption error", "CE, " + printed["corruption"].astype(str))
    printed = printed.rename(columns={"percent_of_clip": "printed"})
    return _matched("Table 2", printed, recomputed, [*_ROWS, "entry"])


def _table_3(errors: pd.DataFrame) -> pd.DataFrame:
    printed = load_published("robustmedclip_table3_average")
    printed = printed.assign(entry="average accuracy", printed=100 * printed["average_accuracy"])
    recomputed = errors.assign(recomputed=100 * errors["average_accuracy"])
    return _matched("Table 3", printed, recomputed, [*_ROWS])


def _table_6(errors: pd.DataFrame) -> pd.DataFrame:
    six = load_published("robustmedclip_table6")
    pbc = errors[errors["dataset"] == "PBC"].set_index("model")
    ours = pbc.loc["RobustMedCLIP"]
    variant = six["variant"] + ", " + (100 * six["few_shot_fraction"]).map("{:g} %".format)
    clean = relative_clean_error(1 - six["clean_accuracy"], pbc.loc[REFERENCE, "clean_error"])
    printed = six["clean_error_percent_of_clip"]
    errors_of_six = pd.DataFrame({"model": variant, "entry": "clean error", "printed": printed, "recomputed": clean})
    # The ViT at 10 % is the model of the other tables.
    shared = six[variant == "RobustMedCLIP-ViT, 10 %"].iloc[0]
    rows = [
        ("clean accuracy", 100 * shared["clean_accuracy"], 100 * (1 - ours["clean_error"])),
        ("average accuracy", 100 * shared["corrupted_accuracy"], 100 * ours["average_accuracy"]),
        ("mCE", shared["mce_percent_of_clip"], ours["mce"]),
    ]
    repeated = pd.DataFrame(rows, columns=["entry", "printed", "recomputed"]).assign(model="RobustMedCLIP-ViT, 10 %")
    table = pd.concat([errors_of_six, repeated], ignore_index=True)
    return table.assign(source="Table 6", collection="MediMeta-C", dataset="PBC")[_COLUMNS]


def _readme(errors: pd.DataFrame) -> pd.DataFrame:
    means = errors.groupby("model", as_index=False)[["relative_clean_error", "mce"]].mean()
    means = means.rename(columns={"relative_clean_error": "clean error", "mce": "mCE"})
    recomputed = means.melt("model", var_name="entry", value_name="recomputed")
    names = {"clean_error_percent_of_clip": "clean error", "mce_percent_of_clip": "mCE"}
    printed = load_published("robustmedclip_readme").rename(columns=names)
    printed = printed.melt("model", [*names.values()], var_name="entry", value_name="printed")
    return _matched("README", printed.assign(collection="all", dataset="mean of 10"), recomputed, ["model", "entry"])


def _matched(source: str, printed: pd.DataFrame, recomputed: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    table = printed.merge(recomputed[[*keys, "recomputed"]], on=keys, how="left", validate="one_to_one")
    return table.assign(source=source)[_COLUMNS]

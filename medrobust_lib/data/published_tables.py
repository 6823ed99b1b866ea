"""The papers' own tables, shipped as tidy CSV so that a result can stand beside the reported number."""

from importlib.resources import files

import pandas as pd

from medrobust_lib.data.wording import closest

_FOLDER = files("medrobust_lib.data") / "published"


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
        ``robustmedclip_readme`` (summary in the authors' repository); ``medmnist_c_alexnet`` (balanced errors
        by which MedMNIST-C normalises; rounded to six decimals); ``test_class_counts`` (images of each class
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
        `medrobust_lib.published_audit.entries_that_do_not_fit` lists them.

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
    names = list_published()
    if name not in names:
        close = closest(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no published table {name!r}.{hint} Available: {', '.join(names)}")
    with (_FOLDER / f"{name}.csv").open(encoding="utf-8") as stream:
        return pd.read_csv(stream, dtype={"table": "string"})

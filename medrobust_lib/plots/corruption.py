"""Figures of corruption benchmarks: each function draws one table on the axes it is given."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from medrobust_lib.plots.style import MARKERS, PALETTE, REFERENCE


def plot_severity_curves(
    table: pd.DataFrame, ax: Axes, *, value: str = "accuracy", by: str = "model", chance: float | None = None
) -> None:
    """Draw a value over severity 0 (clean) to 5, a line per model or corruption; no legend.

    Parameters
    ----------
    table : DataFrame
        Columns severity, ``by`` and ``value``, one row a point; at severity 0 a row per line.
    ax : Axes
    value : str
        accuracy (drawn as a share of 1) or an error in percent of a reference, such as mce (100 is marked).
    by : str
        Column that names the lines; they keep the order of the table.
    chance : float in [0, 1], optional
        Accuracy of guessing, as a reference line.
    """
    for i, (name, rows) in enumerate(table.groupby(by, sort=False)):
        rows = rows.sort_values("severity")
        ax.plot(
            rows.severity, rows[value], color=PALETTE[i % 10], marker=MARKERS[i % 10], ms=5, lw=1.6, label=str(name)
        )  # fmt: skip
    ax.set(xlabel="severity (0: clean)", xticks=sorted(table.severity.unique()))
    if value.endswith("accuracy"):
        ax.set(ylabel=value.replace("_", " "), ylim=(0, 1.02))
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    else:
        ax.set(ylabel="% of the reference")
        ax.axhline(100, color=REFERENCE, ls=":", lw=1)
    if chance is not None:
        ax.axhline(chance, color=REFERENCE, ls=":", label="chance")


def plot_robustness(table: pd.DataFrame, ax: Axes) -> None:
    """Draw mCE against average accuracy: a colour per model, a marker per data set, constant predictors hollow.

    Points of one data set are joined in the order of the models. Low and right is good.

    Parameters
    ----------
    table : DataFrame
        Columns dataset, model, average_accuracy (fraction), mce (percent of the reference) and optionally low,
        high (of mce) and constant, as `metrics.corruption_error_table` gives them.
    ax : Axes
    """
    colours = dict(zip(dict.fromkeys(table.model), PALETTE, strict=False))
    markers = dict(zip(dict.fromkeys(table.dataset), MARKERS * 3, strict=False))
    for name, rows in table.groupby("dataset", sort=False):
        ax.plot(rows.average_accuracy, rows.mce, color="0.8", lw=0.8, zorder=1)
        for row in rows.itertuples():
            colour = colours[row.model]
            if "low" in table:
                ax.vlines(row.average_accuracy, row.low, row.high, color=colour, lw=1.2, alpha=0.5, zorder=2)
            face = "white" if getattr(row, "constant", False) else colour
            ax.scatter(
                row.average_accuracy, row.mce, marker=markers[name], s=60, color=colour, facecolor=face, zorder=3
            )  # fmt: skip
    ax.axhline(100, color=REFERENCE, ls=":", lw=1)
    for model, colour in colours.items():
        ax.plot([], [], "s", color=colour, label=str(model))
    for dataset, marker in markers.items():
        ax.plot([], [], marker, color="0.35", label=str(dataset))
    ax.set(xlabel="average accuracy on corrupted images", ylabel="mCE, % of the reference's error")
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

"""Figures of few-shot adaptation: each function draws one table on the axes it is given."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, PercentFormatter

from medrobust_lib.plots.style import MARKERS, PALETTE, REFERENCE, WRONG, shorten

_KINDS = {"clean_error": ("clean images", "o", PALETTE[0]), "corrupted_error": ("corrupted images", "s", PALETTE[1])}


def plot_fractions(
    table: pd.DataFrame,
    ax: Axes,
    *,
    reference: float | None = None,
    measure: str = "accuracy",
    legend: bool = True,
) -> None:
    """Draw a value over the share of the train split that was learned from, a line per method.

    Markers of one share stand side by side, so that the spread of one method does not hide another's.

    Parameters
    ----------
    table : DataFrame
        Columns method, fraction (in (0, 1]), value and optionally low, high, the spread over seeds; one row per
        method and fraction. Methods keep the order of the table; unknown values (NaN) are left out.
    ax : Axes
    reference : float, optional
        The value before adaptation, as a line.
    measure : str
        What the value is, for the axis. A name that ends in accuracy or error is drawn as a share of 1; anything
        else, such as mCE, is in percent of a reference.
    legend : bool
        Draw it, right of the axes; one of several panels is enough.

    Raises
    ------
    ValueError
        A fraction outside (0, 1], or a method that occurs twice at one fraction.

    References
    ----------
    RobustMedCLIP, arXiv:2505.15425, Figure 9.
    """
    outside = table.fraction[~((table.fraction > 0) & (table.fraction <= 1))]
    if len(outside):
        raise ValueError(f"fraction {outside.iloc[0]:g}: give shares of the train split, above 0 and up to 1")
    repeated = table[table.duplicated(["method", "fraction"])]
    if len(repeated):
        first = repeated.iloc[0]
        raise ValueError(
            f"method {first.method!r} occurs twice at fraction {first.fraction:g}; summarise seeds as value, low, high"
        )
    fractions = np.unique(table.fraction)
    groups = list(table.groupby("method", sort=False))
    # In the logarithm, where the axis is even.
    gaps = np.diff(np.log(fractions))
    apart = min(0.1, 0.5 / len(groups)) * (gaps.min() if len(gaps) else 1.0)
    for i, (method, rows) in enumerate(groups):
        rows = rows.dropna(subset="value").sort_values("fraction")
        beside = rows.fraction * np.exp(apart * (i - (len(groups) - 1) / 2))
        colour = PALETTE[i % 10]
        if "low" in table:
            ax.vlines(beside, rows.low, rows.high, color=colour, alpha=0.5, lw=2)
        ax.plot(
            beside,
            rows.value,
            color=colour,
            lw=1.6,
            marker=MARKERS[i % 10],
            ms=6,
            label=str(method),
            zorder=3,
            markeredgecolor="white",
        )
    if reference is not None:
        ax.axhline(reference, color=REFERENCE, ls=":", label="before adaptation")
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(fractions, [f"{100 * fraction:g}%" for fraction in fractions])
    margin = np.exp(0.35 * (gaps.min() if len(gaps) else 1.0))
    ax.set(xlabel="share of the train split (log scale)", xlim=(fractions[0] / margin, fractions[-1] * margin))
    if measure.endswith(("accuracy", "error")):
        ax.set(ylabel=measure)
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    else:
        ax.set(ylabel=f"{measure}, % of the reference")
    if legend:
        ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def plot_before_after(table: pd.DataFrame, ax: Axes, *, legend: bool = True) -> None:
    """Draw the clean and the corrupted error of every data set before and after adaptation, joined by a line.

    Hollow marks are before, filled ones after; the line of an error that grew has another colour and is broken.

    Parameters
    ----------
    table : DataFrame
        Columns dataset, model (two: the first is before, the second after), clean_error and corrupted_error (the
        mean over corruptions and severities), fractions in [0, 1]. Data sets keep the order of the table.
    ax : Axes
        About 0.55 inches of height per data set are readable.
    legend : bool
        Draw it, right of the axes.

    Raises
    ------
    ValueError
        Not two models, or a data set without exactly one row of each.
    """
    models = list(dict.fromkeys(table.model))
    if len(models) != 2:
        raise ValueError(f"two models are compared, before and after; the table holds {len(models)}: {models}")
    datasets = list(dict.fromkeys(table.dataset))
    for dataset in datasets:
        found = table.model[table.dataset == dataset].tolist()
        if sorted(found) != sorted(models):
            raise ValueError(f"{dataset}: one row of each model is needed, {models}; the table holds {found}")
    before, after = (table[table.model == model].set_index("dataset").loc[datasets] for model in models)
    worse = False
    for offset, (column, (_, marker, colour)) in zip((-0.17, 0.17), _KINDS.items(), strict=True):
        rows = np.arange(len(datasets)) + offset
        grew = (after[column] > before[column]).to_numpy()
        worse |= bool(grew.any())
        for row, low, high, bad in zip(rows, before[column], after[column], grew, strict=True):
            line = {"color": WRONG, "ls": (0, (2, 1))} if bad else {"color": colour, "ls": "-"}
            ax.plot([low, high], [row, row], lw=2, zorder=1, **line)
        ax.scatter(before[column], rows, marker=marker, s=46, facecolor="white", edgecolor=colour, lw=1.6, zorder=2)
        ax.scatter(after[column], rows, marker=marker, s=46, color=colour, zorder=3)
    # Bands keep the two lines of a set together.
    for row in range(0, len(datasets), 2):
        ax.axhspan(row - 0.5, row + 0.5, color="0.955", zorder=0)
    ax.set_yticks(np.arange(len(datasets)), [shorten(str(dataset), 28) for dataset in datasets])
    ax.set(xlabel="error (share of images)", xlim=(0, None), ylim=(len(datasets) - 0.5, -0.5))
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if legend:
        ax.legend(handles=_before_after_handles(models, worse), fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _before_after_handles(models: list[str], worse: bool) -> list[Line2D]:
    mark = {"ls": "", "ms": 7, "markeredgewidth": 1.6}
    handles = [
        Line2D([], [], marker=marker, color=colour, label=label, **mark) for label, marker, colour in _KINDS.values()
    ]
    for model, face in zip(models, ("white", "0.35"), strict=True):
        handles.append(
            Line2D([], [], marker="D", color="0.35", markerfacecolor=face, label=shorten(str(model), 32), **mark)
        )
    if worse:
        handles.append(Line2D([], [], color=WRONG, ls=(0, (2, 1)), lw=2, label="error grew"))
    return handles

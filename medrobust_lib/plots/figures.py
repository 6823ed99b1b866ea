"""Figures of certified accuracy: each function draws one table on the axes it is given."""

from collections.abc import Mapping
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from medrobust_lib.plots.style import CLASS_COLOURS, CORRECT, MARKERS, PALETTE, REFERENCE, WRONG, shorten


def plot_certified_accuracy(table: pd.DataFrame, ax: Axes, *, chance: float | None = None) -> None:
    """Draw certified accuracy over the radius with its interval, a line of steps per sigma, method or both.

    Parameters
    ----------
    table : DataFrame
        Columns sigma, method, radius, certified_accuracy, low, high, as `metrics.certified_accuracy` gives them.
        Where shares are missing (NaN) the line ends, and its name states the reach of the draws (radius_reach).
    ax : Axes
    chance : float in [0, 1], optional
        Accuracy of guessing, as a reference line.
    """
    varying = [column for column in ("method", "sigma") if table[column].nunique() > 1] or ["sigma"]
    groups = list(table.groupby(varying, sort=False))
    widest = float(table.radius.max()) or 1.0
    for i, (key, rows) in enumerate(groups):
        named = dict(zip(varying, key, strict=True))
        label = ", ".join(f"sigma = {value:g}" if name == "sigma" else str(value) for name, value in named.items())
        if rows.certified_accuracy.isna().any() and "radius_reach" in rows:
            label += f" (draws reach {rows.radius_reach.max():.3g})"
        rows = rows.sort_values("radius")
        colour = PALETTE[i % 10]
        # A step reaches back from each radius: between two radii only the larger one's value is known to hold.
        ax.plot(rows.radius, rows.certified_accuracy, color=colour, drawstyle="steps-pre")
        # Side by side, so that the intervals of one radius do not hide each other.
        beside = rows.radius + 0.012 * widest * (i - (len(groups) - 1) / 2)
        ax.vlines(beside, rows.low, rows.high, color=colour, alpha=0.5, lw=1.5)
        ax.scatter(beside, rows.certified_accuracy, color=colour, marker=MARKERS[i % 10], s=26, zorder=3)
        ax.plot([], [], color=colour, marker=MARKERS[i % 10], ms=5, label=label)
    if chance is not None:
        ax.axhline(chance, color=REFERENCE, ls=":", label="chance")
    ax.set(xlabel="L2 radius ([0, 1] pixel units)", ylabel="certified accuracy", ylim=(0, 1.02))
    ax.set_xlim(left=-0.03 * widest)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(fontsize=8)


def plot_certified_methods(table: pd.DataFrame, ax: Axes, *, chance: float | None = None, legend: bool = True) -> None:
    """Draw certified accuracy over the radius at one noise level, a line per method; broken: frozen prompts only.

    Markers of one radius stand side by side, so that methods that certify the same share stay visible.

    Parameters
    ----------
    table : DataFrame
        Columns method, guarantee, radius, certified_accuracy, lowest, highest as `metrics.over_prompt_seeds` gives
        them, of one sigma. A bar spans the seeds of the prompts. Unknown shares (NaN) are left out.
    ax : Axes
    chance : float in [0, 1], optional
        Accuracy of guessing, as a reference line.
    legend : bool
        Draw it, right of the axes; one of several panels is enough.

    Raises
    ------
    ValueError
        The table holds several noise levels.
    """
    if "sigma" in table and table.sigma.nunique() > 1:
        levels = ", ".join(f"{sigma:g}" for sigma in table.sigma.unique())
        raise ValueError(f"one noise level per axes; the table holds sigma {levels}")
    groups = list(table.groupby(["method", "guarantee"], sort=False))
    gaps = np.diff(np.unique(table.radius))
    apart = 0.06 * (gaps.min() if len(gaps) else 1.0)
    for i, ((method, guarantee), rows) in enumerate(groups):
        rows = rows.dropna(subset="certified_accuracy").sort_values("radius")
        colour, line = CLASS_COLOURS[i % 10], "--" if guarantee == "frozen-prompt" else "-"
        beside = rows.radius + apart * (i - (len(groups) - 1) / 2)
        ax.vlines(beside, rows.lowest, rows.highest, color=colour, lw=2.5)
        # A dark rim keeps the palette's light colours visible on white.
        ax.plot(
            beside, rows.certified_accuracy, line, color=colour, lw=1.8, marker=MARKERS[i % 10], ms=6,
            markeredgecolor="0.25", markeredgewidth=0.7, label=str(method), zorder=3,
        )  # fmt: skip
    if chance is not None:
        ax.axhline(chance, color=REFERENCE, ls=":", label="chance")
    ax.set(xlabel="L2 radius ([0, 1] pixel units)", ylabel="certified accuracy", ylim=(-0.02, 1.02))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    if legend:
        ax.legend(
            fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=4,
            title="broken: frozen prompt only", title_fontsize=8, alignment="left",
        )  # fmt: skip


def plot_ablation(table: pd.DataFrame, ax: Axes, *, chance: float | None = None, legend: bool = True) -> None:
    """Draw certified accuracy of the variants of one setting with their interval, a colour per radius.

    Parameters
    ----------
    table : DataFrame
        Columns variant, radius, certified_accuracy, low, high, a row per variant and radius, and optionally
        setting, which names the axis. Variants keep the order of the table; unknown shares (NaN) are left out.
    ax : Axes
    chance : float in [0, 1], optional
        Accuracy of guessing, as a reference line.
    legend : bool
        Draw it, right of the axes; one of several panels is enough.

    Raises
    ------
    ValueError
        A variant occurs twice at one radius.
    """
    repeated = table[table.duplicated(["variant", "radius"])]
    if len(repeated):
        first = repeated.iloc[0]
        raise ValueError(
            f"variant {first.variant!r} occurs twice at radius {first.radius:g}; draw one setting at a time"
        )
    variants = list(dict.fromkeys(table.variant))
    groups = list(table.groupby("radius", sort=True))
    for i, (radius, rows) in enumerate(groups):
        rows = rows.set_index("variant").reindex(variants)
        colour = PALETTE[i % 10]
        beside = np.arange(len(variants)) + 0.5 / len(groups) * (i - (len(groups) - 1) / 2)
        ax.vlines(beside, rows.low, rows.high, color=colour, alpha=0.5, lw=1.5)
        ax.plot(
            beside, rows.certified_accuracy, ":", color=colour, lw=0.8, marker=MARKERS[i % 10], ms=6,
            label=f"radius {radius:g}",
        )  # fmt: skip
    if chance is not None:
        ax.axhline(chance, color=REFERENCE, ls=":", label="chance")
    ax.set_xticks(np.arange(len(variants)), [fill(str(name), 13) for name in variants], fontsize=8)
    settings = table.setting.unique() if "setting" in table else []
    ax.set(xlabel=settings[0] if len(settings) == 1 else "variant", ylabel="certified accuracy")
    ax.set(xlim=(-0.5, len(variants) - 0.5), ylim=(-0.02, 1.02))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    if legend:
        ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


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


def plot_label_votes(votes: Mapping[str, int], ax: Axes, *, answer: str | None = None) -> None:
    """Draw how many noisy copies got each label, as horizontal bars.

    Parameters
    ----------
    votes : mapping of str to int
        Label, or representative of a cluster, to its number of texts; the first one is on top.
    ax : Axes
    answer : str, optional
        The tested label; its bar is coloured.
    """
    names, counts = list(votes), list(votes.values())
    colours = [CORRECT if name == answer else REFERENCE for name in names]
    bars = ax.barh([shorten(name, 34) for name in names], counts, color=colours, height=0.6)
    ax.bar_label(bars, fontsize=8, padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_xlabel("noisy copies")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.tick_params(axis="y", labelsize=8, length=0)


def plot_radius_ratio(table: pd.DataFrame, ax: Axes) -> None:
    """Draw the share of the ideal radius that n draws keep, a line per kind.

    Parameters
    ----------
    table : DataFrame
        Columns n, kind, ratio, and measured: True for points of a run, which get markers and no line.
    ax : Axes
    """
    for i, ((kind, measured), rows) in enumerate(table.groupby(["kind", "measured"], sort=False)):
        rows = rows.sort_values("n")
        style = {"ls": "", "marker": MARKERS[i % 10], "ms": 7, "markeredgecolor": "0.2"} if measured else {"lw": 1.8}
        ax.plot(rows.n, rows.ratio, color=PALETTE[i % 10], label=str(kind), zorder=3 if measured else 2, **style)
    ax.set(xscale="log", xlabel="estimation draws n", ylabel="share of the ideal radius", ylim=(-0.02, 1.02))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(fontsize=8, loc="lower right")


def plot_error_models(table: pd.DataFrame, ax: Axes) -> None:
    """Draw the mean certified radius over the oracle's error rate, a line per error model.

    Parameters
    ----------
    table : DataFrame
        Columns rate, model, radius; abstentions count as radius 0.
    ax : Axes
    """
    for i, (model, rows) in enumerate(table.groupby("model", sort=False)):
        rows = rows.sort_values("rate")
        ax.plot(rows.rate, rows.radius, color=PALETTE[i % 10], marker=MARKERS[i % 10], ms=5, lw=1.8, label=str(model))
    ax.set(xlabel="error rate of the oracle", ylabel="mean certified radius\n([0, 1] pixel units)")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

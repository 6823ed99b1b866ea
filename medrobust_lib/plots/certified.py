"""Figures of certified accuracy: each function draws one table on the axes it is given."""

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from medrobust_lib.plots.style import CLASS_COLOURS, MARKERS, PALETTE, REFERENCE


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

"""Figures of generative models under smoothing: each function draws one table on the axes it is given."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from medrobust_lib.plots.style import CORRECT, MARKERS, PALETTE, REFERENCE, shorten


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

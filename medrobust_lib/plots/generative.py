"""Figures of generative models under smoothing: each function draws one table on the axes it is given."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

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
    """Draw a bound of the true probability over the oracle's error rate, a line per error model.

    Parameters
    ----------
    table : DataFrame
        Columns rate, model, p_lower.
    ax : Axes
    """
    for i, (model, rows) in enumerate(table.groupby("model", sort=False)):
        rows = rows.sort_values("rate")
        ax.plot(rows.rate, rows.p_lower, color=PALETTE[i % 10], marker=MARKERS[i % 10], ms=5, lw=1.8, label=str(model))
    ax.axhline(0.5, color=REFERENCE, ls=":", lw=1)
    ax.text(0.01, 0.5, "abstains below", transform=ax.get_yaxis_transform(), va="bottom", fontsize=8, color=REFERENCE)
    ax.set(xlabel="error rate of the oracle", ylabel="lower bound of p, the true label's share")
    ax.set_ylim(top=min(1.02, np.nanmax(table.p_lower) + 0.08))
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

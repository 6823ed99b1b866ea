"""Figures: each function draws one table or array on the axes it is given and reads no file."""

from collections.abc import Sequence
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from medrobust_lib.metrics import per_class_recall

# Okabe and Ito's palette as seaborn ships it: told apart under every common colour vision deficiency.
PALETTE = sns.color_palette("colorblind")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
CORRECT, WRONG, REFERENCE = PALETTE[0], PALETTE[3], "0.45"
# Paul Tol's "muted" scheme, for figures that colour classes: it has no two oranges, as PALETTE has.
CLASS_COLOURS = (
    "#332288", "#88CCEE", "#DDCC77", "#CC6677", "#117733", "#AA4499", "#999933", "#882255", "#44AA99", "#BBBBBB",
)  # fmt: skip


def set_style() -> None:
    """Set readable defaults for every figure of a notebook."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=0.9)
    plt.rcParams |= {
        "figure.dpi": 84,  # inline only, to keep notebooks small; `Run.save_figure` writes 150
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "image.interpolation": "nearest",
    }


def image_grid(
    images: Sequence[NDArray] | NDArray, titles: Sequence[str], *, n_columns: int = 6, side: float = 1.7
) -> Figure:
    """Draw images [H, W, 3] (uint8, or float in [0, 1]) in a grid, each under its title.

    Titles may hold line breaks; long lines should be broken by the caller.
    """
    n_rows = -(-len(images) // n_columns)
    lines = 1 + max((title.count("\n") for title in titles), default=0)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=(side * n_columns, (side + 0.17 * lines) * n_rows), squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image)
        axis.set_title(title, fontsize=8, loc="center")
    return figure


def plot_similarity(similarities: pd.Series, ax: Axes, *, truth: str | None = None) -> None:
    """Draw cosine similarities of one image with each class text, the true class in another colour."""
    colours = [CORRECT if name == truth else "0.7" for name in similarities.index]
    # Bars at numbered places: two names that are cut to the same label must not share one.
    rows = np.arange(len(similarities))
    ax.barh(rows, similarities.to_numpy(), color=colours)
    ax.set_yticks(rows, [shorten(str(name), 52) for name in similarities.index])
    ax.invert_yaxis()
    ax.set(xlabel="cosine similarity")


def plot_confusion(labels: NDArray, predictions: NDArray, classes: Sequence[str], ax: Axes) -> None:
    """Draw the row-normalised confusion matrix: row = truth, column = prediction."""
    k = len(classes)
    counts = np.zeros((k, k))
    np.add.at(counts, (labels, predictions), 1)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    short = [shorten(name) for name in classes]
    sns.heatmap(
        share, vmin=0, vmax=1, cmap="cividis", annot=k <= 10, fmt=".2f", annot_kws={"size": 7}, ax=ax,
        xticklabels=short, yticklabels=short, cbar_kws={"label": "share of the true class"},
    )  # fmt: skip
    ax.set(xlabel="predicted class", ylabel="true class")
    ax.tick_params(axis="x", rotation=60)
    for label in ax.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")


def plot_recall(labels: NDArray, predictions: NDArray, classes: Sequence[str], ax: Axes) -> None:
    """Draw recall and share of the predictions per class: an over-used class shows at once."""
    names = [shorten(name) for name in classes]
    recall = per_class_recall(labels, predictions, n_classes=len(classes))
    used = np.bincount(predictions[predictions >= 0], minlength=len(classes)) / len(predictions)
    rows = np.arange(len(names))
    ax.barh(rows - 0.2, recall, 0.4, color=PALETTE[0], label="recall")
    ax.barh(rows + 0.2, used, 0.4, color=PALETTE[1], label="share of all predictions")
    ax.axvline(1 / len(names), color=REFERENCE, ls=":", lw=1, label="chance")
    ax.set_yticks(rows, names)
    ax.invert_yaxis()
    ax.set(xlabel="share of images", xlim=(0, 1))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, fontsize=8)


def plot_reliability(bins: pd.DataFrame, ax: Axes) -> None:
    """Draw confidence against accuracy; marker area grows with the number of images in the bin."""
    filled = bins.query("n > 0")
    ax.plot([0, 1], [0, 1], color=REFERENCE, ls=":", label="perfect calibration")
    ax.vlines(filled.confidence, filled.accuracy, filled.confidence, color=PALETTE[1], lw=1.5, label="gap")
    area = 25 + 350 * filled.n / filled.n.sum()
    ax.scatter(filled.confidence, filled.accuracy, s=area, color=PALETTE[0], zorder=3, label="images of a bin")
    ax.set(xlabel="confidence (largest probability)", ylabel="accuracy", xlim=(0, 1.03), ylim=(-0.03, 1.03))
    ax.set_aspect("equal")
    ax.legend(loc="upper left", fontsize=8)


def plot_template_accuracy(table: pd.DataFrame, ax: Axes, *, chance: float) -> None:
    """Draw accuracy with its interval per wording (columns template, kind, accuracy, low, high), coloured by kind."""
    colours = dict(zip(table.kind.unique(), PALETTE, strict=False))
    for kind, group in table.assign(row=np.arange(len(table))).groupby("kind", sort=False):
        ax.hlines(group.row, group.low, group.high, color=colours[kind], lw=2)
        ax.scatter(group.accuracy, group.row, color=colours[kind], zorder=3, label=str(kind))
    ax.axvline(chance, color=REFERENCE, ls=":", label="chance")
    ax.set_yticks(np.arange(len(table)), [shorten(name, 46) for name in table.template])
    ax.invert_yaxis()
    ax.set(xlabel="accuracy with 95 % interval", xlim=(0, 1))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)


def plot_feature_map(table: pd.DataFrame, ax: Axes) -> None:
    """Draw a 2-D map of features (columns x, y, class, kind in {"image", "text"}).

    The legend follows the categories of a categorical ``class`` column, else the order of appearance.
    """
    column = table["class"]
    order = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column.unique()
    for i, name in enumerate(order):
        group = table[column == name]
        colour, marker = CLASS_COLOURS[i % len(CLASS_COLOURS)], MARKERS[i % len(MARKERS)]
        images, texts = (group[group.kind == kind] for kind in ("image", "text"))
        ax.scatter(images.x, images.y, s=14, color=colour, marker=marker, alpha=0.7, label=shorten(str(name)), lw=0)
        ax.scatter(texts.x, texts.y, s=170, color=colour, marker=marker, edgecolor="black", linewidth=1.2, zorder=3)
    ax.set(xlabel="first principal direction", ylabel="second principal direction")
    legend = ax.legend(
        fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=1.7, title="small: image, large: text"
    )
    legend.get_title().set_fontsize(8)


def plot_accuracy_against_sigma(table: pd.DataFrame, ax: Axes, *, chance: float) -> None:
    """Draw accuracy with its interval against noise, a line per model (columns model, sigma, accuracy, low, high)."""
    for i, (model, rows) in enumerate(table.groupby("model", sort=False)):
        ax.plot(rows.sigma, rows.accuracy, marker=MARKERS[i % 10], color=PALETTE[i % 10], label=str(model))
        ax.fill_between(rows.sigma, rows.low, rows.high, color=PALETTE[i % 10], alpha=0.18, lw=0)
    ax.axhline(chance, color=REFERENCE, ls=":", label="chance")
    ax.set(xlabel="noise standard deviation sigma ([0, 1] pixel units)", ylabel="accuracy", ylim=(0, 1.02))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(fontsize=8)


def plot_prediction_shares(table: pd.DataFrame, ax: Axes) -> None:
    """Draw how often each class is predicted at each sigma, stacked (columns sigma, class, share)."""
    wide = table.pivot(index="sigma", columns="class", values="share")[list(table["class"].unique())]
    bottom = np.zeros(len(wide))
    positions = np.arange(len(wide))
    for i, name in enumerate(wide.columns):
        colour = CLASS_COLOURS[i % len(CLASS_COLOURS)]
        hatch = "//" * (i // len(CLASS_COLOURS))
        bars = ax.bar(positions, wide[name], 0.86, bottom=bottom, color=colour, hatch=hatch, label=shorten(name))
        luminance = np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722))
        # Where one answer takes over, the name stands on the bar; elsewhere the legend has to do.
        labels = [f"{shorten(name, 13)}\n{share:.0%}" if share >= 0.4 else "" for share in wide[name]]
        ax.bar_label(bars, labels, label_type="center", fontsize=7, color="black" if luminance > 0.4 else "white")
        bottom += wide[name].to_numpy()
    ax.set_xticks(positions, [f"{sigma:g}" for sigma in wide.index])
    ax.set(xlabel="noise standard deviation sigma", ylabel="share of the predictions", ylim=(0, 1))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    handles, names = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], names[::-1], fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def plot_spectrum(table: pd.DataFrame, ax: Axes) -> None:
    """Draw DCT power against frequency, each line named at its end (columns source, frequency, power).

    Frequencies above 1 exist only along diagonals, up to sqrt(2) in the corner; a line marks where they begin.
    """
    for i, (source, rows) in enumerate(table.groupby("source", sort=False)):
        ax.plot(rows.frequency, rows.power, "-" if i == 0 else "--", color=PALETTE[i % 10])
        ax.annotate(
            str(source), (rows.frequency.iloc[-1], rows.power.iloc[-1]), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=8, color=PALETTE[i % 10],
        )  # fmt: skip
    ax.axvline(1, color=REFERENCE, ls=":", lw=1)
    ax.annotate(
        "Nyquist; beyond it\nonly diagonals", (1, 0.98), xycoords=("data", "axes fraction"), xytext=(4, 0),
        textcoords="offset points", va="top", fontsize=8, color=REFERENCE,
    )  # fmt: skip
    ax.set(xlabel="spatial frequency (fraction of Nyquist)", ylabel="mean squared DCT coefficient", yscale="log")


def plot_votes(votes: Sequence[int] | NDArray, classes: Sequence[str], ax: Axes, *, truth: int | None = None) -> None:
    """Draw how often each class was answered over noisy copies, from 0 to all; the true class in another colour."""
    total = int(np.sum(votes))
    colours = [CORRECT if i == truth else "0.7" for i in range(len(classes))]
    ax.barh(np.arange(len(classes)), votes, color=colours)
    ax.set_yticks(np.arange(len(classes)), [shorten(name) for name in classes])
    ax.invert_yaxis()
    ax.set(xlabel=f"votes out of {total}", xlim=(0, total))


def plot_certified_accuracy(table: pd.DataFrame, ax: Axes, *, chance: float | None = None) -> None:
    """Draw certified accuracy over the radius with its interval, a line of steps per sigma, method or both.

    Parameters
    ----------
    table : DataFrame
        Columns sigma, method, radius, certified_accuracy, low, high, as `metrics.certified_accuracy` gives them.
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
        colour, line = PALETTE[i % 10], "--" if guarantee == "frozen-prompt" else "-"
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


def shorten(text: str, width: int = 24) -> str:
    """Cut a label to a width, marking the cut."""
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"

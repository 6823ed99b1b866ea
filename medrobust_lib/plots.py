"""Figures: each function draws one table or array on the axes it is given and reads no file."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from medrobust_lib.metrics import per_class_recall

# Okabe and Ito's palette as seaborn ships it: told apart under every common colour vision deficiency.
PALETTE = sns.color_palette("colorblind")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
CORRECT, WRONG, REFERENCE = PALETTE[0], PALETTE[3], "0.45"


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
    ax.barh(list(similarities.index), similarities.to_numpy(), color=colours)
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
    """Draw accuracy with its interval per prompt template (columns template, accuracy, low, high)."""
    rows = np.arange(len(table))
    errors = np.abs(table[["low", "high"]].to_numpy().T - table.accuracy.to_numpy())
    colours = [PALETTE[1] if "ensemble" in name else PALETTE[0] for name in table.template]
    ax.hlines(rows, table.accuracy - errors[0], table.accuracy + errors[1], color=colours, lw=2)
    ax.scatter(table.accuracy, rows, color=colours, zorder=3)
    ax.axvline(chance, color=REFERENCE, ls=":", label="chance")
    ax.set_yticks(rows, [shorten(name, 46) for name in table.template])
    ax.invert_yaxis()
    ax.set(xlabel="accuracy with 95 % interval", xlim=(0, 1))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(loc="lower right", fontsize=8)


def plot_feature_map(table: pd.DataFrame, ax: Axes) -> None:
    """Draw a 2-D map of features (columns x, y, class, kind in {"image", "text"})."""
    for i, (name, group) in enumerate(table.groupby("class", sort=False)):
        colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
        images, texts = (group[group.kind == kind] for kind in ("image", "text"))
        ax.scatter(images.x, images.y, s=14, color=colour, marker=marker, alpha=0.7, label=shorten(str(name)), lw=0)
        ax.scatter(texts.x, texts.y, s=170, color=colour, marker=marker, edgecolor="black", linewidth=1.2, zorder=3)
    ax.set(xlabel="first principal direction", ylabel="second principal direction")
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), title="small: image, large: text")


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
        hatch = "" if i < len(PALETTE) else "//"
        ax.bar(positions, wide[name], 0.82, bottom=bottom, color=PALETTE[i % 10], hatch=hatch, label=shorten(name))
        bottom += wide[name].to_numpy()
    ax.set_xticks(positions, [f"{sigma:g}" for sigma in wide.index])
    ax.set(xlabel="noise standard deviation sigma", ylabel="share of the predictions", ylim=(0, 1))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    handles, names = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], names[::-1], fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def plot_spectrum(table: pd.DataFrame, ax: Axes) -> None:
    """Draw DCT power against frequency, a line per source (columns source, frequency, power)."""
    for i, (source, rows) in enumerate(table.groupby("source", sort=False)):
        style = "-" if i == 0 else "--"
        ax.plot(rows.frequency, rows.power, style, color=PALETTE[i % 10], label=str(source))
    ax.set(xlabel="spatial frequency (fraction of Nyquist)", ylabel="mean squared DCT coefficient", yscale="log")
    ax.legend(fontsize=8)


def plot_votes(votes: Sequence[int] | NDArray, classes: Sequence[str], ax: Axes, *, truth: int | None = None) -> None:
    """Draw how often each class was answered over noisy copies; the true class in another colour."""
    colours = [CORRECT if i == truth else "0.7" for i in range(len(classes))]
    ax.barh([shorten(name) for name in classes], votes, color=colours)
    ax.invert_yaxis()
    ax.set(xlabel=f"votes out of {int(np.sum(votes))}")


def shorten(text: str, width: int = 24) -> str:
    """Cut a label to a width, marking the cut."""
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"

"""Figures of answers, votes, features and spectra: each function draws one table or array on the axes it is given."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike, NDArray

from medrobust_lib.metrics import per_class_recall
from medrobust_lib.plots.style import (
    CLASS_COLOURS,
    CORRECT,
    MARKERS,
    MOST_CLASSES,
    PALETTE,
    REFERENCE,
    leading,
    name_rows,
    shorten,
    shown_of,
)


def plot_similarity(similarities: pd.Series, ax: Axes, *, truth: str | None = None) -> None:
    """Draw cosine similarities of one image with each class text, the true class in another colour.

    Of many classes the closest are shown, and the true one.
    """
    total = len(similarities)
    kept = leading(similarities, keep=np.flatnonzero(similarities.index == truth))
    similarities = similarities.iloc[kept]
    colours = [CORRECT if name == truth else "0.7" for name in similarities.index]
    # Bars at numbered places: two names that are cut to the same label must not share one.
    rows = np.arange(len(similarities))
    ax.barh(rows, similarities.to_numpy(), color=colours)
    name_rows(ax.yaxis, similarities.index, width=52)
    ax.invert_yaxis()
    ax.set(xlabel="cosine similarity" + shown_of(len(kept), total, "the closest"))


def plot_confusion(labels: NDArray, predictions: NDArray, classes: Sequence[str], ax: Axes) -> None:
    """Draw the confusion matrix as shares of each true class: row = truth, column = prediction.

    Parameters
    ----------
    labels, predictions : int64 [n]
        A prediction below 0 is an abstention: it stays in the denominator, so its row sums to less than 1.
    classes : sequence of str
        Of many, those with most errors are shown, whether given or received; answers outside them stay in the
        denominator.
    ax : Axes
    """
    k = len(classes)
    counts = np.zeros((k, k))
    answered = predictions >= 0
    np.add.at(counts, (labels[answered], predictions[answered]), 1)
    share = counts / np.maximum(np.bincount(labels, minlength=k)[:, None], 1)
    kept = leading(counts.sum(0) + counts.sum(1) - 2 * counts.diagonal())
    short = [shorten(classes[i]) for i in kept]
    sns.heatmap(
        share[np.ix_(kept, kept)], vmin=0, vmax=1, cmap="cividis", annot=k <= 10, fmt=".2f", annot_kws={"size": 7},
        ax=ax, xticklabels=short, yticklabels=short, cbar_kws={"label": "share of the true class"},
    )  # fmt: skip
    if len(kept) > 10:
        ax.tick_params(labelsize=6.5)
    ax.set(xlabel="predicted class" + shown_of(len(kept), k, "those with most errors"), ylabel="true class")
    ax.tick_params(axis="x", rotation=60)
    for label in ax.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")


def plot_recall(labels: NDArray, predictions: NDArray, classes: Sequence[str], ax: Axes) -> None:
    """Draw recall and share of the predictions per class: an over-used class shows at once.

    Of many classes those are shown that are found least or answered most; recall of a class without images is unknown.
    """
    recall = per_class_recall(labels, predictions, n_classes=len(classes))
    used = np.bincount(predictions[predictions >= 0], minlength=len(classes)) / len(predictions)
    kept = leading(used - recall)
    rows = np.arange(len(kept))
    ax.barh(rows - 0.2, recall[kept], 0.4, color=PALETTE[0], label="recall")
    ax.barh(rows + 0.2, used[kept], 0.4, color=PALETTE[1], label="share of all predictions")
    ax.axvline(1 / len(classes), color=REFERENCE, ls=":", lw=1, label="chance")
    name_rows(ax.yaxis, [classes[i] for i in kept])
    ax.invert_yaxis()
    told = shown_of(len(kept), len(classes), "found least or answered most")
    ax.set(xlabel="share of images" + told, xlim=(0, 1))
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

    The legend follows the categories of a categorical ``class`` column, else the order of appearance. Of many classes
    those with most images are coloured.
    """
    column = table["class"]
    order = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column.unique()
    kept = [order[i] for i in leading(column[table.kind == "image"].value_counts().reindex(order, fill_value=0))]
    others = table[~column.isin(kept)]
    if len(others):
        size = others.kind.map({"image": 14, "text": 60})
        label = f"{len(order) - len(kept)} more classes"
        ax.scatter(others.x, others.y, s=size, color="0.85", marker="o", lw=0, label=label)
    for i, name in enumerate(kept):
        group = table[column == name]
        # The second ten classes have the colours of the first, with other markers.
        colour, marker = CLASS_COLOURS[i % len(CLASS_COLOURS)], MARKERS[(i + i // len(CLASS_COLOURS)) % len(MARKERS)]
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
    """Draw how often each class is predicted at each sigma, stacked (columns sigma, class, share).

    Of many classes the rarer answers are added up.
    """
    wide = table.pivot(index="sigma", columns="class", values="share")[list(table["class"].unique())]
    kept = leading(wide.max(), most=MOST_CLASSES // 2)  # their names stand above each other beside the bars
    if len(kept) < wide.shape[1]:
        kept = kept[wide.max().iloc[kept] > 0]
        rest = wide.drop(columns=wide.columns[kept]).sum(axis=1)
        wide = wide.iloc[:, kept].assign(**{f"{wide.shape[1] - len(kept)} more classes": rest})
    bottom = np.zeros(len(wide))
    positions = np.arange(len(wide))
    for i, name in enumerate(wide.columns):
        colour = CLASS_COLOURS[i % len(CLASS_COLOURS)] if i < len(kept) else "#EEEEEE"
        hatch = ("", "//", "..", "xx")[i // len(CLASS_COLOURS) % 4]
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


def plot_votes(
    votes: ArrayLike, classes: Sequence[str], ax: Axes, *, truth: int | None = None, shown: ArrayLike | None = None
) -> None:
    """Draw how often each class was answered over noisy copies, from 0 to all; the true class in another colour.

    Parameters
    ----------
    votes : int [K]
    classes : sequence of str
    ax : Axes
    truth : int, optional
    shown : int [m], optional
        Classes that get a row, the same for axes that share their names; default: those with most votes and the true
        one.
    """
    votes, keep = np.asarray(votes), [] if truth is None else [truth]
    kept = leading(votes, keep=keep) if shown is None else np.asarray(shown)
    ax.barh(np.arange(len(kept)), votes[kept], color=[CORRECT if i == truth else "0.7" for i in kept])
    name_rows(ax.yaxis, [classes[i] for i in kept])
    ax.invert_yaxis()
    ax.set(xlabel=f"votes out of {votes.sum()}{shown_of(len(kept), len(classes))}", xlim=(0, votes.sum()))

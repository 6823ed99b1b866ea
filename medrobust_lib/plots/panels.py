"""Panels at fixed places, for figures that are drawn anew at every move of a slider.

An automatic layout measures every text before it draws it; with boxes in inches that step, most of a figure's time,
is left out. For the same reason names of bars are texts and not ticks, which cost several lines each.
"""

from collections.abc import Mapping, Sequence
from textwrap import fill, wrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from medrobust_lib.metrics import per_class_recall
from medrobust_lib.plots import figures
from medrobust_lib.plots.figures import CLASS_COLOURS, CORRECT, MARKERS, PALETTE, REFERENCE, WRONG, leading, shorten

Box = tuple[float, float, float, float]
"""Left, top, width and height of a panel, in inches from the upper left corner of the figure."""

_SMALL = 8  # points
_CAPTION = "caption"
BEFORE, OTHER = "0.82", "0.55"
"""Colours of bars: how it was before, and a class that is not the true one."""


def fixed_figure(width: float, height: float) -> Figure:
    """Figure of a size in inches whose panels are placed by hand."""
    figure = plt.figure(figsize=(width, height), layout="constrained")
    # A figure made without an engine gets the default one when it is saved; one whose engine was taken away does not.
    figure.set_layout_engine("none")
    return figure


def add_panel(figure: Figure, box: Box, title: str = "") -> Axes:
    """Axes in a box of the figure."""
    (left, top, width, height), (whole_width, whole_height) = box, figure.get_size_inches()
    corner = left / whole_width, 1 - (top + height) / whole_height
    ax = figure.add_axes((*corner, width / whole_width, height / whole_height))
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=_SMALL)
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set_size(_SMALL)
    if title:
        # A given height saves the search for one that avoids all ticks.
        ax.set_title(title, fontsize=9.5, loc="left", y=1.0, pad=5)
    return ax


def add_picture(figure: Figure, box: Box, image: NDArray | Tensor, title: str) -> Axes:
    """Image uint8 [H, W, 3], or float [3, H, W] clipped to [0, 1], in a box, with its title above."""
    ax = add_panel(figure, box, title)
    if isinstance(image, torch.Tensor):
        image = image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    ax.imshow(image, interpolation="nearest")
    ax.set_axis_off()
    return ax


def add_words(figure: Figure, left: float, top: float, text: str, *, width: int, **style: object) -> None:
    """Text broken at `width` characters, its upper left corner at a place in inches from that of the figure."""
    lines = "\n".join(fill(line, width) for line in text.splitlines())
    whole_width, whole_height = figure.get_size_inches()
    place = (left / whole_width, 1 - top / whole_height)
    figure.text(*place, lines, **{"va": "top", "ha": "left", "fontsize": _SMALL, "color": "0.25", **style})


def add_caption(figure: Figure, top: float, text: str, *, width: int = 165) -> None:
    """Sentences below all panels, which `take_caption` can take out again."""
    add_words(figure, 0.1, top, text, width=width)
    figure.texts[-1].set(gid=_CAPTION, label=text)


def take_caption(figure: Figure) -> str:
    """Remove the captions of a figure and return their text: long texts are slow to draw, and better read as text."""
    captions = [text for text in figure.texts if text.get_gid() == _CAPTION]
    for text in captions:
        text.remove()
    return "\n".join(text.get_label() for text in captions)


def plot_named_bars(
    values: ArrayLike,
    names: Sequence[str],
    ax: Axes,
    *,
    total: float,
    truth: int | None = None,
    before: ArrayLike | None = None,
    told: Sequence[str] | None = None,
    shown: Sequence[int] | None = None,
) -> None:
    """Draw one bar per class from 0 to a total, the true class in another colour.

    Whole numbers (votes) stand at the bars that are not empty, of others (probabilities) percent at the longest one.

    Parameters
    ----------
    values : float or int [K]
    names : sequence of str
        K names, which stand left of the axes; none where they are left to another panel of the same classes.
    ax : Axes
    total : float
        Right end of the axis: 1 for probabilities, the number of draws for votes.
    truth : int, optional
        Class whose bar and name are coloured.
    before : float or int [K], optional
        Thin bars above the others.
    told : sequence of str, optional
        Texts at the bars instead, "" for none.
    shown : sequence of int, optional
        Classes that get a bar; default: all.
    """
    chosen, names = list(range(len(values)) if shown is None else shown), figures.readable(names)
    values, rows = np.asarray(values)[chosen], np.arange(len(chosen))
    ends, lift, height = values, 0.0, 0.72
    if before is not None:
        before, lift, height = np.asarray(before)[chosen], 0.16, 0.5
        ends = np.maximum(values, before)
        ax.barh(rows - 0.24, before, 0.3, color=BEFORE, edgecolor="0.5", linewidth=0.5)
    ax.barh(rows + lift, values, height, color=[CORRECT if k == truth else OTHER for k in chosen])
    counts = np.issubdtype(values.dtype, np.integer)
    if told is None and counts:
        told = [f"{value:d}" if value else "" for value in values]
    elif told is None:
        told = [f"{value:.0%}" if row == values.argmax() else "" for row, value in enumerate(values)]
    for row, end, text in zip(rows, ends, told, strict=True):
        if text:
            ax.text(end + 0.015 * total, row + lift, text, va="center", fontsize=7, color="0.25", clip_on=False)
    if len(names):
        write_names([names[k] for k in chosen], ax, truth=chosen.index(truth) if truth in chosen else None)
    ax.set(yticks=[], ylim=(_last(len(values)), -0.6), xlim=(0, total))
    ticks = (0, total / 2, total)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks] if counts else [f"{tick:.0%}" for tick in ticks])


def write_names(names: Sequence[str], ax: Axes, *, truth: int | None = None, width: int = 26) -> None:
    """Names of rows 0, 1, ... left of the axes, broken into at most two lines; the true class coloured."""
    across = ax.get_yaxis_transform()
    for row, name in enumerate(names):
        style = {"color": CORRECT, "fontweight": "bold"} if row == truth else {"color": "0.15"}
        lines = wrap(str(name), width) or [""]
        lines = [lines[0], shorten(" ".join(lines[1:]), width)] if len(lines) > 1 else lines
        style |= {"fontsize": _SMALL if len(lines) == 1 else _SMALL - 1, "linespacing": 1.05}
        ax.text(-0.02, row, "\n".join(lines), transform=across, ha="right", va="center", **style)


def _last(count: int) -> float:
    """Lower end of an axis of rows: a few bars are as thick as many."""
    return max(count, 5) - 0.4


def plot_dots(values: ArrayLike, ax: Axes, *, chosen: int, limits: tuple[float, float]) -> None:
    """Draw one dot per row on an axis that need not begin at 0, the chosen one coloured.

    Parameters
    ----------
    values : float [K]
    ax : Axes
    chosen : int
    limits : (float, float)
        Of the axis; values beyond widen it.
    """
    values = np.asarray(values, dtype=float)
    rows = np.arange(len(values))
    low, high = min(limits[0], values.min()), max(limits[1], values.max())
    margin = 0.04 * (high - low or 1.0)
    low, high = low - margin, high + margin
    ax.hlines(rows, low, values, color="0.88", lw=1)
    ax.scatter(values, rows, color=[CORRECT if row == chosen else OTHER for row in rows], s=34, zorder=3)
    ax.set(yticks=[], ylim=(_last(len(values)), -0.6), xlim=(low, high))
    ax.locator_params(axis="x", nbins=4)


def plot_proof(p_lower: float, ax: Axes, *, curve: tuple[NDArray, NDArray], right: bool) -> None:
    """Draw the certified radius over the proved probability, and where one certificate stands.

    Parameters
    ----------
    p_lower : float in [0, 1]
        What the votes prove of the class tested.
    ax : Axes
    curve : (float [m], float [m])
        Probabilities from 0.5 to the largest that the draws can prove, and their radii in [0, 1] pixel units.
    right : bool
        Whether the class tested is the true one.
    """
    probability, radius = curve
    most = float(radius[-1])
    ax.axvspan(0, 0.5, color="0.93", lw=0)
    ax.text(0.25, 0.6 * most, "abstain", ha="center", fontsize=_SMALL, color=REFERENCE)
    ax.plot(probability, radius, color="0.6", lw=1.4)
    ax.axvline(probability[-1], color=REFERENCE, ls=":", lw=1)
    proved = p_lower > 0.5
    height = float(np.interp(p_lower, probability, radius)) if proved else 0.0
    colour, marker = (CORRECT if right else WRONG, "o") if proved else (PALETTE[1], "X")
    ax.plot([p_lower, p_lower, 0], [0, height, height], color=colour, lw=1)
    ax.plot(p_lower, height, marker, color=colour, ms=8, clip_on=False)
    ax.set(xlabel="proved probability", xlim=(0, 1), xticks=(0, 0.5, 1))
    ax.set(ylabel="radius (L2, [0, 1] pixels)", ylim=(0, 1.04 * most))
    ax.locator_params(axis="y", nbins=4)


def plot_chosen_curve(table: pd.DataFrame, ax: Axes, *, chosen: str) -> None:
    """Draw certified accuracy over the radius, one method in colour and the others in grey.

    Parameters
    ----------
    table : DataFrame
        Columns method, radius (in [0, 1] pixel units) and certified_accuracy.
    ax : Axes
    chosen : str
    """
    in_colour = {"color": CORRECT, "lw": 2.4, "ms": 5, "zorder": 4}
    for name, rows in table.groupby("method", sort=False):
        style = in_colour if name == chosen else {"color": "0.8", "lw": 1.2, "ms": 2.5}
        ax.plot(rows.radius, rows.certified_accuracy, marker="o", **style)
    ax.set_yticks((0, 0.5, 1), ("0%", "50%", "100%"))
    ax.set(xlabel="L2 radius ([0, 1] pixel units)", ylabel="certified accuracy", ylim=(-0.02, 1.02))
    ax.locator_params(axis="x", nbins=5)


def plot_spectra(spectra: Mapping[str, tuple[ArrayLike, ArrayLike]], ax: Axes) -> None:
    """Draw power over spatial frequency on a logarithmic axis: the first line grey and broad, the others on top.

    Parameters
    ----------
    spectra : mapping of str to (float [m], float [m])
        Frequency (fraction of Nyquist) and mean squared DCT coefficient, by the name in the legend.
    ax : Axes
    """
    for i, (name, (frequency, power)) in enumerate(spectra.items()):
        style = {"color": "0.7", "lw": 4} if i == 0 else {"color": PALETTE[(i - 1) % 10], "lw": 1.6}
        # A constant image has no power. Logarithms on a plain axis: the ticks of a logarithmic one take longer than the
        # rest of the panel.
        ax.plot(frequency, np.log10(np.maximum(power, 1e-12)), label=name, **style)
    first, last = int(np.floor(ax.dataLim.y0)), int(np.ceil(max(0.0, ax.dataLim.y1)))
    ax.axvline(1, color=REFERENCE, ls=":", lw=1)
    ticks = range(first, last + 1, max(1, (last - first) // 3))
    ax.set_yticks(ticks, [f"$10^{{{tick}}}$" for tick in ticks])
    ax.set(xlabel="spatial frequency (1: Nyquist)", xlim=(0, np.sqrt(2)), xticks=(0, 0.5, 1), ylim=(first, last))
    ax.legend(fontsize=_SMALL, loc="upper right", frameon=False, handlelength=1.6)


def plot_moves(before: NDArray, after: NDArray, ax: Axes, *, right: NDArray[np.bool_]) -> None:
    """Draw where a probability was (hollow) and is (filled), a row each; the filled marker tells right from wrong.

    Parameters
    ----------
    before, after : float [m]
        In [0, 1].
    ax : Axes
    right : bool [m]
        Whether the answer of each row is right now.
    """
    rows, after, right = np.arange(len(before)), np.asarray(after), np.asarray(right)
    ax.hlines(rows, before, after, color="0.75", lw=1.5)
    ax.scatter(before, rows, s=42, facecolor="white", edgecolor="0.35", zorder=3)
    for is_right, colour, marker in ((True, CORRECT, MARKERS[0]), (False, WRONG, "X")):
        chosen = right == is_right
        ax.scatter(after[chosen], rows[chosen], s=46, color=[colour], marker=marker, zorder=4)
    ax.set_xticks((0, 0.5, 1), ("0%", "50%", "100%"))
    ax.set(xlabel="probability of the true class", yticks=[], ylim=(len(rows) - 0.25, -0.5), xlim=(-0.03, 1.03))


def plot_similarity(similarities: pd.Series, ax: Axes, *, truth: str | None = None) -> None:
    """Draw cosine similarities of one image with each class text, the true class in another colour.

    Of many classes the closest are shown, and the true one.
    """
    total, shown = len(similarities), figures.readable(list(similarities.index))
    kept = leading(similarities, keep=np.flatnonzero(similarities.index == truth))
    similarities = similarities.iloc[kept]
    names, coloured = [shown[k] for k in kept], [name == truth for name in similarities.index]
    figures.plain_bars(similarities.to_numpy(), names, ax, coloured=coloured, width=52)
    ax.set(xlabel="cosine similarity" + figures.shown_of(len(kept), total, "the closest"))


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
    k, classes = len(classes), figures.readable(classes)
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
    ax.set(xlabel="predicted class" + figures.shown_of(len(kept), k, "those with most errors"), ylabel="true class")
    plt.setp(ax.get_xticklabels(), rotation=60, ha="right", rotation_mode="anchor")


def plot_recall(labels: NDArray, predictions: NDArray, classes: Sequence[str], ax: Axes) -> None:
    """Draw recall and share of the predictions per class: an over-used class shows at once.

    Of many classes those are shown that are found least or answered most; recall of a class without images is unknown.
    """
    recall = per_class_recall(labels, predictions, n_classes=len(classes))
    used = np.bincount(predictions[predictions >= 0], minlength=len(classes)) / len(predictions)
    kept = leading(used - recall)
    rows, classes = np.arange(len(kept)), figures.readable(classes)
    ax.barh(rows - 0.2, recall[kept], 0.4, color=PALETTE[0], label="recall")
    ax.barh(rows + 0.2, used[kept], 0.4, color=PALETTE[1], label="share of all predictions")
    ax.axvline(1 / len(classes), color=REFERENCE, ls=":", lw=1, label="chance")
    figures.name_rows(ax.yaxis, [classes[i] for i in kept])
    ax.invert_yaxis()
    told = figures.shown_of(len(kept), len(classes), "found least or answered most")
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
    figures.name_rows(ax.yaxis, figures.readable(list(table.template), noun="wording"), width=46)
    ax.invert_yaxis()
    ax.set(xlabel="accuracy with 95 % interval", xlim=(0, 1))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    figures.legend_beside(ax)


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
    shown = dict(zip(order, figures.readable(list(map(str, order))), strict=True))
    for i, name in enumerate(kept):
        group = table[column == name]
        # The second ten classes have the colours of the first, with other markers.
        colour, marker = CLASS_COLOURS[i % len(CLASS_COLOURS)], MARKERS[(i + i // len(CLASS_COLOURS)) % len(MARKERS)]
        images, texts = (group[group.kind == kind] for kind in ("image", "text"))
        ax.scatter(images.x, images.y, s=14, color=colour, marker=marker, alpha=0.7, label=shorten(shown[name]), lw=0)
        ax.scatter(texts.x, texts.y, s=170, color=colour, marker=marker, edgecolor="black", linewidth=1.2, zorder=3)
    ax.set(xlabel="first principal direction", ylabel="second principal direction")
    title = "small: image, large: text" if (table.kind == "text").any() else None
    figures.legend_beside(ax, markerscale=1.7, title=title, title_fontsize=8)


def plot_accuracy_against_sigma(table: pd.DataFrame, ax: Axes, *, chance: float) -> None:
    """Draw accuracy with its interval against noise, a line per model (columns model, sigma, accuracy, low, high)."""
    figures.plot_curves(table, ax, x="sigma", y="accuracy", by="model")
    for i, (_, rows) in enumerate(table.groupby("model", sort=False)):
        ax.fill_between(rows.sigma, rows.low, rows.high, color=PALETTE[i % 10], alpha=0.18, lw=0)
    noise = "noise standard deviation sigma ([0, 1] pixel units)"
    figures.accuracy_axis(ax, chance, xlabel=noise, ylabel="accuracy", ylim=(0, 1.02))
    ax.legend(fontsize=8)


def plot_prediction_shares(table: pd.DataFrame, ax: Axes) -> None:
    """Draw how often each class is predicted at each sigma, stacked (columns sigma, class, share).

    Of many classes the rarer answers are added up.
    """
    wide = table.pivot(index="sigma", columns="class", values="share")[list(table["class"].unique())]
    wide.columns = figures.readable(list(wide.columns))
    kept = leading(wide.max(), most=figures.MOST_CLASSES // 2)  # their names stand above each other beside the bars
    if len(kept) < wide.shape[1]:
        kept = kept[wide.max().iloc[kept] > 0]
        rest = wide.drop(columns=wide.columns[kept]).sum(axis=1)
        wide = wide.iloc[:, kept].assign(**{f"{wide.shape[1] - len(kept)} more classes": rest})
    bottom, positions = np.zeros(len(wide)), np.arange(len(wide))
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
    figures.accuracy_axis(ax, xlabel="noise standard deviation sigma", ylabel="share of the predictions", ylim=(0, 1))
    handles, names = ax.get_legend_handles_labels()
    figures.legend_beside(ax, handles=handles[::-1], labels=names[::-1])


def plot_spectrum(table: pd.DataFrame, ax: Axes) -> None:
    """Draw DCT power against frequency, each line named at its end (columns source, frequency, power).

    Frequencies above 1 exist only along diagonals, up to sqrt(2) in the corner; a line marks where they begin.
    """
    beside = {"xytext": (4, 0), "textcoords": "offset points", "fontsize": _SMALL}
    for i, (source, rows) in enumerate(table.groupby("source", sort=False)):
        ax.plot(rows.frequency, rows.power, "-" if i == 0 else "--", color=PALETTE[i % 10])
        end = rows.frequency.iloc[-1], rows.power.iloc[-1]
        ax.annotate(str(source), end, va="center", color=PALETTE[i % 10], **beside)
    ax.axvline(1, color=REFERENCE, ls=":", lw=1)
    place = {"xy": (1, 0.98), "xycoords": ("data", "axes fraction"), "va": "top"}
    ax.annotate("Nyquist; beyond it\nonly diagonals", color=REFERENCE, **place, **beside)
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
    classes = figures.readable(classes)
    figures.plain_bars(votes[kept], [classes[i] for i in kept], ax, coloured=[i == truth for i in kept])
    ax.set(xlabel=f"votes out of {votes.sum()}{figures.shown_of(len(kept), len(classes))}", xlim=(0, votes.sum()))


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
    names, coloured = figures.readable(list(votes), noun="text"), [name == answer for name in votes]
    figures.plain_bars(np.array(list(votes.values())), names, ax, coloured=coloured, width=34)
    ax.bar_label(ax.containers[0], fontsize=8, padding=3)
    ax.margins(x=0.12)
    ax.set_xlabel("noisy copies")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.tick_params(axis="y", labelsize=8, length=0)


def plot_error_models(table: pd.DataFrame, ax: Axes) -> None:
    """Draw the mean certified radius over the oracle's error rate, a line per error model.

    Parameters
    ----------
    table : DataFrame
        Columns rate, model, radius; abstentions count as radius 0.
    ax : Axes
    """
    figures.plot_curves(table, ax, x="rate", y="radius", by="model", ms=5, lw=1.8)
    ax.set(xlabel="error rate of the oracle", ylabel="mean certified radius\n([0, 1] pixel units)")
    ax.set_ylim(bottom=0)
    figures.legend_beside(ax)

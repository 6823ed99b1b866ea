"""Style and palettes that every figure shares, and the figures of certificates, corruptions and adaptation.

Each function draws one table on the axes it is given.
"""

import warnings
from collections.abc import Sequence
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font, get_font_names
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

# Okabe and Ito's palette as seaborn ships it: told apart under every common colour vision deficiency.
PALETTE = sns.color_palette("colorblind")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
CORRECT, WRONG, REFERENCE = PALETTE[0], PALETTE[3], "0.45"
# Paul Tol's "muted" scheme, for figures that colour classes: it has no two oranges, as PALETTE has.
CLASS_COLOURS = (
    "#332288", "#88CCEE", "#DDCC77", "#CC6677", "#117733", "#AA4499", "#999933", "#882255", "#44AA99", "#BBBBBB",
)  # fmt: skip

MOST_CLASSES = 24
"""Classes that stay readable in one figure; one that leaves others out says so."""
# Common fonts with letters that DejaVu Sans, which comes with matplotlib, lacks.
_MORE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans",
    "Microsoft YaHei", "Malgun Gothic", "Apple SD Gothic Neo", "Noto Sans Devanagari", "Noto Sans Bengali",
    "Noto Sans Tamil", "Noto Sans Thai", "Noto Emoji", "Segoe UI Emoji", "Arial Unicode MS", "Unifont",
)  # fmt: skip


def set_style() -> None:
    """Set readable defaults for every figure of a notebook, with the installed fonts of many scripts."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=0.9)
    installed = set(get_font_names())
    plt.rcParams |= {
        "font.family": ["sans-serif", *(name for name in _MORE_FONTS if name in installed)],
        "figure.dpi": 84,  # inline only, to keep notebooks small; `Run.save_figure` writes 150
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "image.interpolation": "nearest",
    }


def image_grid(
    images: ArrayLike, titles: Sequence[str], *, n_columns: int = 6, side: float = 1.7, rows: Sequence[str] = ()
) -> Figure:
    """Draw images [H, W, 3] (uint8, or float in [0, 1]) in a grid, each under its title.

    Titles may hold line breaks; long lines should be broken by the caller. Fewer titles than images leave the
    others without one. ``rows``, one a row of the grid, stand on the left.
    """
    n_rows = -(-len(images) // n_columns)
    lines = 1 + max((title.count("\n") for title in titles), default=0)
    # Titles of the first row only take no room in the others.
    titled = n_rows if len(titles) > n_columns else 1
    size = (side * n_columns, side * n_rows + 0.17 * lines * titled)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image in zip(axes.flat, images, strict=False):
        axis.imshow(image)
    for axis, title in zip(axes.flat, titles, strict=False):
        axis.set_title(title, fontsize=8, loc="center")
    for axis, name in zip(axes[:, 0], rows, strict=False):
        # The axes are switched off, and their labels with them.
        style = {"transform": axis.transAxes, "rotation": 90, "va": "center", "ha": "right", "fontsize": 8}
        axis.text(-0.06, 0.5, shorten(name, 18), **style)
    return figure


def leading(values: ArrayLike, *, most: int = MOST_CLASSES, keep: Sequence[int] = ()) -> NDArray[np.int64]:
    """Positions of the largest values, ascending: the classes that a figure shows where there are too many for it.

    Parameters
    ----------
    values : float or int [K]
        NaN comes last.
    most : int
        All are shown where there are no more.
    keep : sequence of int
        Positions that are shown whatever their values.
    """
    ranked = np.array(values, dtype=float)
    ranked[list(keep)] = np.inf
    return np.sort(np.argsort(-ranked, kind="stable")[:most])


def name_rows(axis: Axis, names: Sequence[str], *, width: int = 24) -> None:
    """Name the rows or columns 0, 1, ... of an axis, in smaller letters where there are many."""
    axis.set_ticks(np.arange(len(names)), [shorten(str(name), width) for name in names])
    if len(names) > MOST_CLASSES // 2:
        axis.set_tick_params(labelsize=6.5)


def shown_of(shown: int, total: int, which: str = "") -> str:
    """Say which classes of how many a figure shows, after a semicolon on a line of its own; empty where it is all."""
    return f";\nshown: {', '.join(filter(None, (f'{shown} of {total} classes', which)))}" if shown < total else ""


def shorten(text: str, width: int = 24) -> str:
    """Cut a label to a width, marking the cut."""
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def readable(names: Sequence[str], *, noun: str = "class") -> list[str]:
    """Names as a figure can show them: one with letters that no font here has becomes its number, such as class 3.

    Give all classes in their order, so that the numbers are those of labels in tables. One warning names the letters.
    """
    if all(name.isascii() for name in names):
        return list(names)
    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in plt.rcParams["font.family"]]
    letters = {letter for name in names for letter in name if letter.isprintable()}
    lacking = {letter for letter in letters if not any(font.get_char_index(ord(letter)) for font in fonts)}
    numbers = {name: f"{noun} {k}" for k, name in enumerate(names) if lacking & set(name)}
    if lacking:
        told = ", ".join(f"{number} is {name}" for name, number in numbers.items())
        warnings.warn(
            f"no font here has the letters {' '.join(sorted(lacking))}; figures show the numbers that tables call "
            f"label: {told}. Install a font with these letters, such as Noto Sans CJK or Noto Emoji, empty the "
            "folder that matplotlib.get_cachedir() names, and start again",
            stacklevel=3,
        )
    return [numbers.get(name, name) for name in names]


def plain_bars(values: NDArray, names: Sequence[str], ax: Axes, *, coloured: Sequence[bool], width: int = 24) -> None:
    """Draw a bar for each name, the first on top; names are cut to a width, some bars coloured."""
    # Bars at numbered places: two names that are cut to the same label must not share one.
    ax.barh(np.arange(len(values)), values, color=[CORRECT if one else "0.7" for one in coloured])
    name_rows(ax.yaxis, names, width=width)
    ax.invert_yaxis()


def legend_beside(ax: Axes, **options: object) -> None:
    """Draw the legend right of the axes, where it covers no data."""
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), **options)


def accuracy_axis(ax: Axes, chance: float | None = None, **labels: object) -> None:
    """Let an axis of shares read in percent, with the accuracy of guessing, if there is one, as a reference line."""
    if chance is not None:
        ax.axhline(chance, color=REFERENCE, ls=":", label="chance")
    ax.set(**labels)
    ax.yaxis.set_major_formatter(PercentFormatter(1))


def plot_curves(table: pd.DataFrame, ax: Axes, *, x: str, y: str, by: str, **style: object) -> None:
    """Draw a line with markers for each group of a table, in the order of the table; ``style`` goes to matplotlib."""
    for i, (name, rows) in enumerate(table.groupby(by, sort=False)):
        rows = rows.sort_values(x)
        line = "-" if i < 10 else "--"  # colours and markers begin anew
        ax.plot(rows[x], rows[y], line, color=PALETTE[i % 10], marker=MARKERS[i % 10], label=str(name), **style)


def _aside(i: int, count: int) -> float:
    """Where the i-th of several marks stands, in steps from the place of all, so that none hides another."""
    return i - (count - 1) / 2


def _check_once(table: pd.DataFrame, name: str, at: str, advice: str) -> None:
    repeated = table[table.duplicated([name, at])]
    if len(repeated):
        first = repeated.iloc[0]
        raise ValueError(f"{name} {first[name]!r} occurs twice at {at} {first[at]:g}; {advice}")


def _radius_in_words(table: pd.DataFrame) -> str:
    name, *others = table["perturbation"].unique() if "perturbation" in table else ["pixel-noise"]
    if others:
        raise ValueError(f"radii of {name}, {', '.join(others)} are in units of their own; draw one per axes")
    return "L2 radius ([0, 1] pixel units)" if name == "pixel-noise" else f"radius of {name}"


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
        if not isinstance(named.get("sigma", ""), str):
            named["sigma"] = f"{named['sigma']:g}"
        label = ", ".join(f"sigma = {own}" if name == "sigma" else str(own) for name, own in named.items())
        if rows.certified_accuracy.isna().any() and "radius_reach" in rows:
            label += f" (draws reach {rows.radius_reach.max():.3g})"
        rows = rows.sort_values("radius")
        colour = PALETTE[i % 10]
        # A step reaches back from each radius: between two radii only the larger one's value is known to hold.
        ax.plot(rows.radius, rows.certified_accuracy, color=colour, drawstyle="steps-pre")
        # Side by side, so that the intervals of one radius do not hide each other.
        beside = rows.radius + 0.012 * widest * _aside(i, len(groups))
        ax.vlines(beside, rows.low, rows.high, color=colour, alpha=0.5, lw=1.5)
        ax.scatter(beside, rows.certified_accuracy, color=colour, marker=MARKERS[i % 10], s=26, zorder=3)
        ax.plot([], [], color=colour, marker=MARKERS[i % 10], ms=5, label=label)
    accuracy_axis(ax, chance, xlabel=_radius_in_words(table), ylabel="certified accuracy", ylim=(0, 1.02))
    ax.set_xlim(left=-0.03 * widest)
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
        levels = ", ".join(one if isinstance(one, str) else f"{one:g}" for one in table.sigma.unique())
        raise ValueError(f"one noise level per axes; the table holds sigma {levels}")
    groups = list(table.groupby(["method", "guarantee"], sort=False))
    apart = 0.06 * min(np.diff(np.unique(table.radius)), default=1.0)
    for i, ((method, guarantee), rows) in enumerate(groups):
        rows = rows.dropna(subset="certified_accuracy").sort_values("radius")
        colour, line = CLASS_COLOURS[i % 10], "--" if guarantee == "frozen-prompt" else "-"
        beside = rows.radius + apart * _aside(i, len(groups))
        ax.vlines(beside, rows.lowest, rows.highest, color=colour, lw=2.5)
        # A dark rim keeps the palette's light colours visible on white.
        rim = {"markeredgecolor": "0.25", "markeredgewidth": 0.7}
        style = {"color": colour, "ls": line, "lw": 1.8, "marker": MARKERS[i % 10], "ms": 6}
        ax.plot(beside, rows.certified_accuracy, label=str(method), zorder=3, **style, **rim)
    accuracy_axis(ax, chance, xlabel=_radius_in_words(table), ylabel="certified accuracy", ylim=(-0.02, 1.02))
    if legend:
        legend_beside(ax, handlelength=4, title="broken: frozen prompt only", title_fontsize=8, alignment="left")


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
    _check_once(table, "variant", "radius", "draw one setting at a time")
    variants = list(dict.fromkeys(table.variant))
    groups = list(table.groupby("radius", sort=True))
    for i, (radius, rows) in enumerate(groups):
        rows = rows.set_index("variant").reindex(variants)
        colour = PALETTE[i % 10]
        beside = np.arange(len(variants)) + 0.5 / len(groups) * _aside(i, len(groups))
        ax.vlines(beside, rows.low, rows.high, color=colour, alpha=0.5, lw=1.5)
        style = {"color": colour, "ls": ":", "lw": 0.8, "marker": MARKERS[i % 10], "ms": 6}
        ax.plot(beside, rows.certified_accuracy, label=f"radius {radius:g}", **style)
    ax.set_xticks(np.arange(len(variants)), [fill(str(name), 13) for name in variants], fontsize=8)
    settings = table.setting.unique() if "setting" in table else []
    ax.set(xlabel=settings[0] if len(settings) == 1 else "variant", xlim=(-0.5, len(variants) - 0.5))
    accuracy_axis(ax, chance, ylabel="certified accuracy", ylim=(-0.02, 1.02))
    if legend:
        legend_beside(ax)


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
        Accuracy of guessing, as a reference line where the value is an accuracy.
    """
    plot_curves(table, ax, x="severity", y=value, by=by, ms=5, lw=1.6)
    ax.set(xlabel="severity (0: clean)", xticks=sorted(table.severity.unique()))
    if value.endswith("accuracy"):
        accuracy_axis(ax, chance, ylabel=value.replace("_", " "), ylim=(0, 1.02))
    else:
        ax.set(ylabel="% of the reference")
        ax.axhline(100, color=REFERENCE, ls=":", lw=1)


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
            style = {"marker": markers[name], "s": 60, "color": colour, "facecolor": face}
            ax.scatter(row.average_accuracy, row.mce, zorder=3, **style)
    ax.axhline(100, color=REFERENCE, ls=":", lw=1)
    for model, colour in colours.items():
        ax.plot([], [], "s", color=colour, label=str(model))
    for dataset, marker in markers.items():
        ax.plot([], [], marker, color="0.35", label=str(dataset))
    ax.set(xlabel="average accuracy on corrupted images", ylabel="mCE, % of the reference's error")
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend_beside(ax)


_KINDS = {"clean_error": ("clean images", "o", PALETTE[0]), "corrupted_error": ("corrupted images", "s", PALETTE[1])}


def plot_fractions(
    table: pd.DataFrame, ax: Axes, *, reference: float | None = None, measure: str = "accuracy", legend: bool = True
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
    _check_once(table, "method", "fraction", "summarise seeds as value, low, high")
    fractions = np.unique(table.fraction)
    groups = list(table.groupby("method", sort=False))
    # In the logarithm, where the axis is even.
    gap = min(np.diff(np.log(fractions)), default=1.0)
    apart = min(0.1, 0.5 / len(groups)) * gap
    for i, (method, rows) in enumerate(groups):
        rows = rows.dropna(subset="value").sort_values("fraction")
        beside = rows.fraction * np.exp(apart * _aside(i, len(groups)))
        colour = PALETTE[i % 10]
        if "low" in table:
            ax.vlines(beside, rows.low, rows.high, color=colour, alpha=0.5, lw=2)
        style = {"color": colour, "lw": 1.6, "marker": MARKERS[i % 10], "ms": 6, "markeredgecolor": "white"}
        ax.plot(beside, rows.value, label=str(method), zorder=3, **style)
    if reference is not None:
        ax.axhline(reference, color=REFERENCE, ls=":", label="before adaptation")
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(fractions, [f"{100 * fraction:g}%" for fraction in fractions])
    margin = np.exp(0.35 * gap)
    ax.set(xlabel="share of the train split (log scale)", xlim=(fractions[0] / margin, fractions[-1] * margin))
    if measure.endswith(("accuracy", "error")):
        ax.set(ylabel=measure)
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    else:
        ax.set(ylabel=f"{measure},\n% of the reference")
    if legend:
        legend_beside(ax)


def plot_before_after(table: pd.DataFrame, ax: Axes) -> None:
    """Draw the clean and the corrupted error of every data set before and after adaptation, joined by a line.

    Hollow marks are before, filled ones after; the line of an error that grew has another colour and is broken.

    Parameters
    ----------
    table : DataFrame
        Columns dataset, model (two: the first is before, the second after), clean_error and corrupted_error (the
        mean over corruptions and severities), fractions in [0, 1]. Data sets keep the order of the table.
    ax : Axes
        About 0.55 inches of height per data set are readable.

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
    legend_beside(ax, handles=_before_after_handles(models, worse))


def _before_after_handles(models: list[str], worse: bool) -> list[Line2D]:
    kinds = [{"marker": marker, "color": colour, "label": label} for label, marker, colour in _KINDS.values()]
    faces = zip(models, ("white", "0.35"), strict=True)
    dot = {"marker": "D", "color": "0.35"}
    kinds += [dot | {"markerfacecolor": face, "label": shorten(str(model), 32)} for model, face in faces]
    handles = [Line2D([], [], ls="", ms=7, markeredgewidth=1.6, **kind) for kind in kinds]
    grew = Line2D([], [], color=WRONG, ls=(0, (2, 1)), lw=2, label="error grew")
    return [*handles, grew] if worse else handles


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
    ax.set(xscale="log", xlabel="estimation draws n")
    accuracy_axis(ax, ylabel="share of the ideal radius", ylim=(-0.02, 1.02))
    ax.legend(fontsize=8, loc="lower right")

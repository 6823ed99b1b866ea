"""Style, palettes and grids of images, which every figure shares."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axis import Axis
from matplotlib.figure import Figure
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
    images: Sequence[NDArray] | NDArray,
    titles: Sequence[str],
    *,
    n_columns: int = 6,
    side: float = 1.7,
    rows: Sequence[str] = (),
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
        axis.text(
            -0.06, 0.5, shorten(name, 18), transform=axis.transAxes, rotation=90, va="center", ha="right", fontsize=8
        )
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

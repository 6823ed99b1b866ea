"""Figures of few-shot adaptation: what stands where, and tables that are refused."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_rgb

from medrobust_lib import plots

FRACTIONS = (0.1, 0.01, 0.03)


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    figure.canvas.draw()  # a figure that cannot be drawn fails here
    plt.close(figure)


def fractions_table(*methods, fractions=FRACTIONS):
    rows = [(method, fraction, 0.5 + fraction + 0.1 * i) for i, method in enumerate(methods) for fraction in fractions]
    table = pd.DataFrame(rows, columns=["method", "fraction", "value"])
    return table.assign(low=table.value - 0.05, high=table.value + 0.1)


def errors_table(**sets):
    """Clean before, clean after, corrupted before, corrupted after, by data set."""
    rows = [(name, "base", e[0], e[2]) for name, e in sets.items()]
    rows += [(name, "adapted", e[1], e[3]) for name, e in reversed(sets.items())]
    return pd.DataFrame(rows, columns=["dataset", "model", "clean_error", "corrupted_error"])


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_fractions_have_a_line_per_method_in_order_of_the_share(ax):
    plots.plot_fractions(fractions_table("b", "a"), ax, reference=0.4)
    first, second, reference = ax.lines
    assert first.get_xdata() == pytest.approx([0.01, 0.03, 0.1], rel=0.1)
    assert first.get_ydata() == pytest.approx([0.51, 0.53, 0.6])
    assert (first.get_xdata() < second.get_xdata()).all() and first.get_marker() != second.get_marker()
    # Side by side by the same distance at every share, as the axis shows it.
    np.testing.assert_allclose(np.ptp(np.log(second.get_xdata() / first.get_xdata())), 0, atol=1e-9)
    assert reference.get_ydata() == [0.4, 0.4]
    assert legend_texts(ax) == ["b", "a", "before adaptation"]


def test_fractions_have_a_tick_each_and_no_other(ax):
    plots.plot_fractions(fractions_table("a", fractions=(0.01, 0.03, 0.07, 0.1, 0.005)), ax)
    assert ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.5%", "1%", "3%", "7%", "10%"]
    assert len(ax.xaxis.get_minorticklocs()) == 0
    left, right = ax.get_xlim()
    assert left < 0.005 and right > 0.1
    assert ax.get_xlabel() == "share of the train split (log scale)"


def test_bars_span_the_seeds_where_there_are_several(ax):
    plots.plot_fractions(fractions_table("a"), ax)
    (bars,) = [collection for collection in ax.collections if isinstance(collection, LineCollection)]
    assert [tuple(bar[:, 1]) for bar in bars.get_segments()] == [
        pytest.approx((value - 0.05, value + 0.1)) for value in (0.51, 0.53, 0.6)
    ]
    figure, other = plt.subplots()
    plots.plot_fractions(fractions_table("a").drop(columns=["low", "high"]), other, legend=False)
    assert not other.collections and other.get_legend() is None
    plt.close(figure)


def test_a_single_fraction_and_unknown_values_can_be_drawn(ax):
    plots.plot_fractions(fractions_table("a", "b", fractions=(0.1,)), ax)
    assert ax.lines[0].get_xdata()[0] < 0.1 < ax.lines[1].get_xdata()[0]
    figure, other = plt.subplots()
    table = fractions_table("a")
    plots.plot_fractions(table.assign(value=table.value.where(table.fraction != 0.03)), other)
    assert other.lines[0].get_ydata() == pytest.approx([0.51, 0.6])
    assert [label.get_text() for label in other.get_xticklabels()] == ["1%", "3%", "10%"]
    plt.close(figure)


@pytest.mark.parametrize(
    ("measure", "label", "share"),
    [
        ("accuracy", "accuracy", True),
        ("clean error", "clean error", True),
        ("mCE", "mCE,\n% of the reference", False),
    ],
)
def test_the_value_axis_names_the_measure_and_its_unit(ax, measure, label, share):
    plots.plot_fractions(fractions_table("a"), ax, measure=measure)
    assert ax.get_ylabel() == label
    assert ax.yaxis.get_major_formatter()(0.5).startswith("50") == share


def test_shares_that_lie_close_together_have_different_labels(ax):
    plots.plot_fractions(
        fractions_table("a").drop(columns=["low", "high"]).assign(value=[0.061, 0.064, 0.066, 0.068][: len(FRACTIONS)]),
        ax,
        measure="clean error",
    )
    ax.figure.draw_without_rendering()
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert len(set(labels)) == len(labels) and labels[0].endswith("%")


def test_fraction_tables_that_cannot_be_drawn_are_refused(ax):
    with pytest.raises(ValueError, match="fraction 10: give shares of the train split, above 0 and up to 1"):
        plots.plot_fractions(fractions_table("a", fractions=(0.1, 10)), ax)
    with pytest.raises(ValueError, match="fraction 0: give shares"):
        plots.plot_fractions(fractions_table("a", fractions=(0, 0.1)), ax)
    twice = pd.concat([fractions_table("a"), fractions_table("a", fractions=(0.1,))])
    with pytest.raises(
        ValueError, match="method 'a' occurs twice at fraction 0.1; summarise seeds as value, low, high"
    ):
        plots.plot_fractions(twice, ax)


SETS = {"z": (0.3, 0.1, 0.5, 0.4), "y": (0.2, 0.2, 0.3, 0.35)}


def points(ax):
    """Coordinates and whether filled, of each set of marks."""
    found = [collection for collection in ax.collections if isinstance(collection, PathCollection)]
    return [(c.get_offsets().tolist(), c.get_facecolor()[0][:3].tolist() != [1, 1, 1]) for c in found]


def test_before_is_hollow_and_after_is_filled_in_the_row_of_their_set(ax):
    plots.plot_before_after(errors_table(**SETS), ax)
    (clean_before, clean_after, corrupted_before, corrupted_after) = points(ax)
    assert [x for x, _ in clean_before[0]] == [0.3, 0.2] and not clean_before[1]
    assert [x for x, _ in clean_after[0]] == [0.1, 0.2] and clean_after[1]
    assert [x for x, _ in corrupted_before[0]] == [0.5, 0.3] and not corrupted_before[1]
    assert [x for x, _ in corrupted_after[0]] == [0.4, 0.35] and corrupted_after[1]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["z", "y"]
    rows = [np.round([y for _, y in marks]) for marks, _ in points(ax)]
    assert all(row.tolist() == [0, 1] for row in rows)
    assert ax.yaxis_inverted() and ax.get_xlim()[0] == 0
    assert ax.get_xlabel() == "error (share of images)"


def test_an_error_that_grew_is_broken_and_in_another_colour(ax):
    plots.plot_before_after(errors_table(**SETS), ax)
    broken = [line for line in ax.lines if line.is_dashed()]
    assert [list(line.get_xdata()) for line in broken] == [[0.3, 0.35]]
    assert to_rgb(broken[0].get_color()) == pytest.approx(plots.WRONG)
    assert len(ax.lines) == 4 and not any(to_rgb(line.get_color()) == plots.WRONG for line in ax.lines[:3])
    assert legend_texts(ax) == ["clean images", "corrupted images", "base", "adapted", "error grew"]
    figure, other = plt.subplots()
    plots.plot_before_after(errors_table(z=SETS["z"]), other)
    assert "error grew" not in legend_texts(other)
    plt.close(figure)


def test_the_legend_covers_no_data(ax):
    plots.plot_before_after(errors_table(**SETS), ax)
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1


def test_names_that_are_cut_alike_keep_their_own_rows(ax):
    alike = {"a data set with a very long common beginning, " + end: SETS["z"] for end in ("one", "two")}
    plots.plot_before_after(errors_table(**alike), ax)
    assert len({round(y) for _, y in points(ax)[0][0]}) == 2


def test_comparisons_that_are_not_of_two_models_are_refused(ax):
    table = errors_table(**SETS)
    with pytest.raises(ValueError, match=r"two models are compared, .*; the table holds 1: \['base'\]"):
        plots.plot_before_after(table[table.model == "base"], ax)
    with pytest.raises(ValueError, match=r"y: one row of each model is needed, .*; the table holds \['base'\]"):
        plots.plot_before_after(table[(table.dataset == "z") | (table.model == "base")], ax)
    with pytest.raises(ValueError, match=r"the table holds \['base', 'adapted', 'base'\]"):
        plots.plot_before_after(pd.concat([table, table[:1]]), ax)

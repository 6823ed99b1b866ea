"""Figures of generative models: what stands where."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from medrobust_lib import plots


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    figure.canvas.draw()  # a figure that cannot be drawn fails here
    plt.close(figure)


def test_votes_are_bars_in_order_with_the_tested_answer_coloured(ax):
    plots.plot_label_votes({"safe": 3, "unsafe": 8, "no label": 1}, ax, answer="unsafe")
    assert [bar.get_width() for bar in ax.patches] == [3, 8, 1]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["safe", "unsafe", "no label"]
    colours = [bar.get_facecolor()[:3] for bar in ax.patches]
    assert colours[1] == to_rgb(plots.CORRECT)
    assert colours[0] == colours[2] != colours[1]
    assert ax.yaxis_inverted()  # the first on top


def test_no_votes_are_an_empty_figure(ax):
    plots.plot_label_votes({}, ax)
    assert not ax.patches


def test_measured_ratios_are_markers_and_computed_ones_lines(ax):
    table = pd.DataFrame(
        {"n": [1000, 10, 100], "kind": ["exact", "exact", "measured"], "ratio": [0.8, 0.1, 0.5],
         "measured": [False, False, True]}
    )  # fmt: skip
    plots.plot_radius_ratio(table, ax)
    line, points = ax.lines
    assert list(line.get_xdata()) == [10, 1000]
    assert line.get_marker() in ("None", "none", None)
    assert (points.get_linestyle(), list(points.get_ydata())) == ("None", [0.5])
    assert ax.get_xscale() == "log"


def test_error_models_are_lines_over_the_rate(ax):
    table = pd.DataFrame({"rate": [0.1, 0.0] * 2, "model": ["a", "a", "b", "b"], "radius": [0.2, 0.3, 0.0, 0.3]})
    plots.plot_error_models(table, ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.3, 0.2], [0.3, 0.0]]
    assert ax.get_ylim()[0] == 0

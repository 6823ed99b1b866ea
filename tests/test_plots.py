import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from medrobust_lib import metrics, plots

CLASSES = ["first", "second", "a third one with a very long name indeed"]


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    figure.canvas.draw()  # a figure that cannot be drawn fails here
    plt.close(figure)


@pytest.fixture
def answers():
    rng = np.random.default_rng(0)
    return rng.integers(0, 3, 60), rng.integers(0, 3, 60)


def test_every_plot_labels_its_axes_with_units(answers):
    labels, predictions = answers
    probabilities = np.random.default_rng(1).dirichlet(np.ones(3), 60)
    levels = pd.DataFrame(
        {"model": "m", "sigma": [0.0, 0.5], "accuracy": [0.9, 0.2], "low": [0.8, 0.1], "high": [1, 0.3]}
    )
    shares = pd.DataFrame({"sigma": [0.0] * 3 + [0.5] * 3, "class": CLASSES * 2, "share": [0.3, 0.3, 0.4, 1, 0, 0]})
    features = pd.DataFrame({"x": [0, 1.0], "y": [1, 0.0], "class": CLASSES[:2], "kind": ["image", "text"]})
    spectrum = pd.DataFrame({"source": ["a", "a"], "frequency": [0.1, 0.2], "power": [1, 0.1]})
    templates = pd.DataFrame(
        {"template": ["{}", "ensemble of 2"], "accuracy": [0.5, 0.6], "low": [0.4, 0.5], "high": [0.6, 0.7]}
    )
    draw = {
        "confusion": lambda ax: plots.plot_confusion(labels, predictions, CLASSES, ax),
        "recall": lambda ax: plots.plot_recall(labels, predictions, CLASSES, ax),
        "reliability": lambda ax: plots.plot_reliability(metrics.calibration_bins(probabilities, labels), ax),
        "templates": lambda ax: plots.plot_template_accuracy(templates, ax, chance=1 / 3),
        "features": lambda ax: plots.plot_feature_map(features, ax),
        "sigma": lambda ax: plots.plot_accuracy_against_sigma(levels, ax, chance=1 / 3),
        "shares": lambda ax: plots.plot_prediction_shares(shares, ax),
        "spectrum": lambda ax: plots.plot_spectrum(spectrum, ax),
        "votes": lambda ax: plots.plot_votes([3, 1, 0], CLASSES, ax, truth=1),
        "similarity": lambda ax: plots.plot_similarity(pd.Series([0.1, 0.2], CLASSES[:2]), ax, truth="first"),
    }
    for name, plot in draw.items():
        figure, ax = plt.subplots()
        plot(ax)
        assert ax.get_xlabel(), name
        figure.canvas.draw()
        plt.close(figure)


def test_confusion_rows_are_shares_of_the_true_class(ax):
    plots.plot_confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), ["a", "b"], ax)
    assert [text.get_text() for text in ax.texts] == ["0.50", "0.50", "0.00", "1.00"]


def test_votes_title_counts_all_votes_and_colours_the_truth(ax):
    plots.plot_votes([30, 12, 8], CLASSES, ax, truth=1)
    assert ax.get_xlabel() == "votes out of 50"
    colours = [bar.get_facecolor()[:3] for bar in ax.patches]
    assert colours[1] == pytest.approx(plots.CORRECT)
    assert colours[0] == colours[2] != colours[1]


def test_noise_axis_says_its_unit(ax):
    table = pd.DataFrame({"model": ["m"], "sigma": [0.1], "accuracy": [0.5], "low": [0.4], "high": [0.6]})
    plots.plot_accuracy_against_sigma(table, ax, chance=0.1)
    assert "[0, 1] pixel units" in ax.get_xlabel()


def test_image_grid_hides_the_axes_of_empty_places():
    figure = plots.image_grid(np.zeros((4, 8, 8, 3), np.uint8), ["a", "b", "c", "d"], n_columns=3)
    assert len(figure.axes) == 6
    assert not any(axis.axison for axis in figure.axes)
    plt.close(figure)


def test_shorten_marks_the_cut():
    assert plots.shorten("mucus") == "mucus"
    assert plots.shorten("colorectal adenocarcinoma epithelium", 12) == "colorectal…"
    assert len(plots.shorten("x" * 90)) == 24


def test_palette_is_told_apart_in_gray_and_under_deuteranopia():
    # The palette's first four colours, which carry meaning, differ in luminance or along the blue axis.
    colours = np.array(plots.PALETTE[:4])
    luminance = colours @ [0.2126, 0.7152, 0.0722]
    for i in range(4):
        for j in range(i):
            assert max(abs(luminance[i] - luminance[j]), abs(colours[i, 2] - colours[j, 2])) > 0.05

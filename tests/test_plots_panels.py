import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

from medrobust_lib import plots
from medrobust_lib.plots import panels


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def figure():
    return panels.fixed_figure(4, 2)


def test_a_panel_stands_where_its_box_says_also_after_saving(figure, tmp_path):
    with plt.rc_context({"figure.constrained_layout.use": True}):
        ax = panels.add_panel(figure, (1, 0.5, 2, 1), "a title")
        for name in ("one.png", "two.png"):  # a figure without an engine of its own would be laid out the second time
            figure.savefig(tmp_path / name)
    np.testing.assert_allclose(ax.get_position().bounds, (0.25, 0.25, 0.5, 0.5))


def test_pictures_of_tensors_are_clipped_for_display(figure):
    ax = panels.add_picture(figure, (0, 0, 1, 1), torch.tensor([-1.0, 0.5, 2.0])[:, None, None].expand(3, 2, 2), "x")
    np.testing.assert_allclose(ax.images[0].get_array()[0, 0], [0, 0.5, 1])


def test_bars_of_votes_tell_their_numbers_and_mark_the_true_class(figure):
    ax = panels.add_panel(figure, (1, 0, 2, 2))
    panels.plot_named_bars([0, 7, 3], ["a", "b", "c"], ax, total=10, truth=2)
    assert [bar.get_width() for bar in ax.patches] == [0, 7, 3]
    assert [text.get_text() for text in ax.texts] == ["7", "3", "a", "b", "c"]
    colours = [bar.get_facecolor() for bar in ax.patches]
    assert colours[0] == colours[1] != colours[2]


def test_long_names_are_broken_once_and_then_cut(figure):
    ax = panels.add_panel(figure, (1, 0, 2, 2))
    panels.write_names(["colorectal adenocarcinoma epithelium", "word " * 30, ""], ax, width=26)
    lines = [text.get_text().split("\n") for text in ax.texts]
    assert lines[0] == ["colorectal adenocarcinoma", "epithelium"]
    assert len(lines[1]) == 2
    assert all(len(line) <= 26 for line in lines[1])
    assert lines[1][1].endswith("…")


def test_names_without_blanks_keep_the_begin_of_their_second_line(figure):
    ax = panels.add_panel(figure, (1, 0, 2, 2))
    panels.write_names([f"local-dir:/models/finetuned_on_{name}_2026" for name in ("kather", "pannuke")], ax, width=24)
    first, second = (text.get_text().split("\n") for text in ax.texts)
    assert len(first) == len(second) == 2 and first[1] != second[1]


def test_bars_take_names_of_an_index(figure):
    ax = panels.add_panel(figure, (1, 0, 2, 2))
    panels.plot_named_bars(np.array([0.2, 0.8]), pd.Index(["a", "b"]), ax, total=1, truth=0)
    assert {"a", "b"} <= {text.get_text() for text in ax.texts}


@pytest.mark.parametrize(("p_lower", "height"), [(0.4, 0.0), (0.75, 0.5)])
def test_a_proof_stands_on_its_curve_or_at_zero(figure, p_lower, height):
    ax = panels.add_panel(figure, (1, 0, 2, 2))
    panels.plot_proof(p_lower, ax, curve=(np.array([0.5, 1.0]), np.array([0.0, 1.0])), right=True)
    point = ax.lines[-1]
    np.testing.assert_allclose((point.get_xdata()[0], point.get_ydata()[0]), (p_lower, height))


def test_a_spectrum_of_nothing_is_drawn(figure):
    ax = panels.add_panel(figure, (1, 0, 2, 2))
    panels.plot_spectra({"clean": ([0, 1], [1.0, 0.1]), "constant": ([0, 1], [0.0, 0.0])}, ax)
    assert np.isfinite(ax.lines[1].get_ydata()).all()


def test_captions_are_taken_out_whole(figure):
    panels.add_words(figure, 0.1, 0.1, "stays", width=20)
    panels.add_caption(figure, 1.5, "first sentence, which is long enough to be broken\nsecond", width=20)
    assert panels.take_caption(figure) == "first sentence, which is long enough to be broken\nsecond"
    assert [text.get_text() for text in figure.texts] == ["stays"]
    assert panels.take_caption(figure) == ""


def test_names_that_no_font_has_become_numbers_of_classes_and_one_warning_says_which():
    names = ["normal", "\U000130fd one", "naïve", "опухоль", "\U000130fe"]  # no font here has hieroglyphs
    plots.set_style()
    with pytest.warns(UserWarning, match=r"class 1 is .*class 4 is .*Install a font") as told:
        assert plots.readable(names) == ["normal", "class 1", "naïve", "опухоль", "class 4"]
    assert len(told) == 1


@pytest.mark.filterwarnings("ignore:no font here has the letters")
def test_no_figure_of_classes_draws_a_letter_that_its_fonts_lack():
    names = [f"\U000130fd {k}" for k in range(3)]
    labels = np.array([0, 1, 2, 2])
    plots.set_style()
    figure, axes = plt.subplots(4, 2, figsize=(9, 12))
    shares = pd.DataFrame([{"sigma": 0.1, "class": name, "share": 1 / 3} for name in names])
    places = pd.DataFrame(
        {"x": labels, "y": labels, "class": pd.Categorical.from_codes(labels, names), "kind": "image"}
    )
    wordings = pd.DataFrame({"template": names, "kind": "own", "accuracy": 0.5, "low": 0.4, "high": 0.6})
    for ax, draw in zip(
        axes.flat,
        [
            lambda ax: plots.plot_confusion(labels, labels, names, ax),
            lambda ax: plots.plot_recall(labels, labels, names, ax),
            lambda ax: plots.plot_votes([1, 2, 3], names, ax, truth=1),
            lambda ax: plots.plot_similarity(pd.Series([0.1, 0.2, 0.3], names), ax, truth=names[1]),
            lambda ax: plots.plot_prediction_shares(shares, ax),
            lambda ax: plots.plot_feature_map(places, ax),
            lambda ax: plots.plot_template_accuracy(wordings, ax, chance=0.3),
            lambda ax: panels.plot_named_bars([1, 2, 3], names, ax, total=6, truth=1),
        ],
        strict=True,
    ):
        draw(ax)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()
    drawn = {text.get_text() for text in figure.findobj(Text)}
    plt.close(figure)
    assert {"class 0", "class 1", "class 2", "wording 2"} <= drawn
    assert not any(name in text for name in names for text in drawn)


def test_set_style_takes_installed_fonts_of_other_scripts_only(monkeypatch):
    monkeypatch.setattr("medrobust_lib.plots.figures.get_font_names", lambda: ["DejaVu Sans", "Unifont", "Noto Emoji"])
    with plt.rc_context():
        plots.set_style()
        assert plt.rcParams["font.family"] == ["sans-serif", "Noto Emoji", "Unifont"]

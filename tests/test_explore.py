import matplotlib.pyplot as plt
import numpy as np
import pytest

from medrobust_lib import SUITES, explore, load_dataset, load_model, load_questions, load_vlm
from medrobust_lib.corruptions.benchmark import corrupted
from medrobust_lib.smoothing.generative_study import default_oracle


@pytest.fixture(scope="module")
def model():
    return load_model("demo-clip", device="cpu")


@pytest.fixture(scope="module")
def data():
    return load_dataset("phantom/blood", n=8)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_similarity_view_colours_the_closest_prompt(model, data):
    figure = explore.similarity_view(model, data, index=2, prompts=["a neutrophil", "a platelet"])
    bars = figure.axes[1].patches
    widths = [bar.get_width() for bar in bars]
    coloured = [tuple(bar.get_facecolor()[:3]) == tuple(explore.plt.matplotlib.colors.to_rgb("0.7")) for bar in bars]
    assert coloured[widths.index(max(widths))] is False
    assert coloured.count(True) == 1


def test_noise_view_at_sigma_zero_is_unanimous(model, data):
    texts = model.class_features(data.classes, data.templates[:1])
    figure = explore.noise_view(model, data, texts, index=1, sigma=0.0, n=6)
    assert sorted(bar.get_width() for bar in figure.axes[1].patches)[-1] == 6
    assert figure.axes[1].get_xlabel() == "votes out of 6"


@pytest.fixture
def drawn(monkeypatch):
    """Figures that an instrument displays, latest last."""
    figures = []
    monkeypatch.setattr("IPython.display.display", figures.append)
    return figures


def test_moving_a_slider_redraws_the_chosen_image(model, data, drawn):
    texts = model.class_features(data.classes, data.templates[:1])
    for box in (explore.explore_similarity(model, data), explore.explore_noise(model, data, texts)):
        before = len(drawn)
        box.children[0].value = 3
        assert len(drawn) == before + 1
        assert data.classes[data.labels[3]] in drawn[-1].axes[0].get_title()


def test_the_noise_slider_changes_the_picture(model, data, drawn):
    texts = model.class_features(data.classes, data.templates[:1])
    box = explore.explore_noise(model, data, texts)
    box.children[1].value = 0.5
    assert "sigma = 0.5" in drawn[-1].axes[0].get_title()
    pictures = [figure.axes[0].images[0].get_array() for figure in drawn[-2:]]
    assert abs(pictures[0] - pictures[1]).mean() > 0.05


def test_empty_prompts_fall_back_to_the_classes(model, data, drawn):
    box = explore.explore_similarity(model, data)
    box.children[1].value = "one prompt"
    assert len(drawn[-1].axes[1].patches) == 1
    box.children[1].value = "  \n"
    assert len(drawn[-1].axes[1].patches) == len(data.classes)


def test_a_long_class_name_does_not_run_into_the_bars(model):
    histology = load_dataset("phantom/histology", n=9)
    texts = model.class_features(histology.classes, histology.templates[:1])
    index = int((histology.labels == 8).argmax())
    figures = (
        explore.similarity_view(model, histology, index=index, prompts=histology.classes),
        explore.noise_view(model, histology, texts, index=index, sigma=0.1, n=2),
    )
    for figure in figures:
        figure.canvas.draw()
        title = figure.axes[0].title.get_window_extent()
        assert title.x1 < figure.axes[1].get_tightbbox().x0


def test_corruption_view_shows_clean_and_corrupted(model, data):
    texts = model.class_features(data.classes, data.templates[:1])
    figure = explore.corruption_view(model, data, texts, index=1, corruption="contrast", severity=4)
    clean, _, worse, _ = figure.axes
    np.testing.assert_array_equal(clean.images[0].get_array(), data.images[1])
    expected = corrupted(data.subset([1]), "contrast", severity=4)
    np.testing.assert_array_equal(worse.images[0].get_array(), expected.images[0])
    assert worse.get_title(loc="center") + worse.get_title(loc="left") == "contrast\nseverity 4"


def test_the_severity_slider_changes_the_picture(model, data, drawn):
    texts = model.class_features(data.classes, data.templates[:1])
    box = explore.explore_corruptions(model, data, texts)
    _, corruption, severity, _ = box.children
    assert corruption.options == SUITES["medimeta-c"].corruptions
    before = len(drawn)
    severity.value = 5
    assert len(drawn) > before


def test_answer_view_counts_every_copy_and_shows_sentences():
    asked = load_questions("phantom/blood", task="action", n=8)
    figure = explore.answer_view(
        load_vlm("demo-vlm", device="cpu"), asked, default_oracle(asked), index=3, sigma=0.25, n=12
    )
    clean, *noisy, bars = figure.axes
    assert clean.get_title() == f"clean\ntruth: {asked.truths[3]}"
    assert all(ax.get_title().startswith("<") for ax in noisy)
    assert sum(bar.get_width() for bar in bars.patches) == 12


def test_the_instrument_of_notebook_06_has_its_sliders():
    asked = load_questions("phantom/blood", task="action", n=8)
    box = explore.explore_answers(load_vlm("demo-vlm", device="cpu"), asked, default_oracle(asked))
    assert [control.description for control in box.children[:2]] == ["image", "sigma"]

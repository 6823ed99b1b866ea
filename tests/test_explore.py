import matplotlib.pyplot as plt
import pytest

from medrobust_lib import explore, load_dataset, load_model


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


def test_moving_a_slider_redraws(model, data):
    texts = model.class_features(data.classes, data.templates[:1])
    for box in (explore.explore_similarity(model, data), explore.explore_noise(model, data, texts)):
        index, output = box.children[0], box.children[-1]
        first = output.outputs
        index.value = 3
        assert output.outputs, "nothing was drawn"
        assert output.outputs != first or not first


def test_empty_prompts_fall_back_to_the_classes(model, data):
    box = explore.explore_similarity(model, data)
    box.children[1].value = "  \n"
    assert box.children[-1].outputs is not None

import math

import numpy as np
import pytest

from medrobust_lib import certify, explore
from medrobust_lib.explore.images import ONE_PARAMETER
from medrobust_lib.smoothing.bounds import FEW_N, FEW_N0
from medrobust_lib.smoothing.methods import PromptClassifier
from medrobust_lib.smoothing.perturbations import find_perturbation


def caption(figure):
    return figure.texts[-1].get_label()


@pytest.mark.parametrize("name", ONE_PARAMETER)
def test_the_certificate_is_that_of_certify_and_its_range_is_gray(model, data, texts, name):
    figure = explore.range_view(model, data, texts, perturbation=name, index=2, share=0.5, seed=3)
    pixels, sigma = model.prepare(data.images[2:3])[0], find_perturbation(name).usual_sigma
    address = {"dataset": data.id, "index": int(data.indices[2]), "seed": 3, "perturbation": name}
    expected = certify(PromptClassifier(model, texts), pixels, sigma=sigma, n0=FEW_N0, n=FEW_N, **address)
    assert str(expected) in caption(figure)
    assert not expected.abstained
    (band,) = figure.axes[2].patches
    low = 0 if name == "blur" else -expected.radius
    np.testing.assert_allclose([band.get_x(), band.get_x() + band.get_width()], [low, expected.radius])


def test_the_picture_is_the_image_at_the_place_of_the_slider(model, data, texts):
    figure = explore.range_view(model, data, texts, perturbation="contrast", index=1, share=-0.5)
    pixels = model.prepare(data.images[1:2])[0]
    mean = pixels.mean((1, 2), keepdim=True)
    moved = mean + math.exp(-find_perturbation("contrast").usual_sigma) * (pixels - mean)
    np.testing.assert_allclose(
        figure.axes[1].images[0].get_array(), moved.clamp(0, 1).permute(1, 2, 0).numpy(), atol=1e-6
    )


def test_bare_answers_and_the_smoothed_curve_stand_at_their_places(model, data, texts):
    figure = explore.range_view(model, data, texts, perturbation="brightness", index=4, share=0.0)
    lines = figure.axes[2].lines[:-1]  # the last is the slider's place
    ticks = [
        line.get_ydata() for line in lines if np.isin(line.get_ydata(), (-0.08, np.nan), assume_unique=False).any()
    ]
    curves = [line.get_ydata() for line in lines if (np.nan_to_num(line.get_ydata()) > 0).any()]
    assert (sum(np.isfinite(line).astype(int) for line in ticks) == 1).all()  # one bare answer at every point
    assert (sum(np.isfinite(line).astype(int) for line in curves) == 1).all()


def test_nothing_overlaps(model, data, texts, overlaps):
    assert overlaps(explore.range_view(model, data, texts, perturbation="gamma", index=0, share=0.3)) == ([], [])


def test_the_instrument_moves(model, data, texts):
    instrument = explore.explore_ranges(model, data, texts, n=20)
    first = instrument.picture.value
    instrument.controls["perturbation"].value = "blur"
    assert instrument.message.value == ""
    assert instrument.picture.value != first

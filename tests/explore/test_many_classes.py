"""Instruments of a data set of 200 classes: 24 of them are shown, the true one among them, and that is said."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from medrobust_lib import explore
from medrobust_lib.smoothing.prompts import text_prompts

TRUTH, TOLD = 150, "shown: 24 of 200 classes"


@pytest.fixture(scope="module")
def many(data):
    """Images of a data set that says it has 200 classes; all are of the same one."""
    return replace(data, classes=tuple(f"thing {k}" for k in range(200)), labels=np.full(len(data), TRUTH))


@pytest.fixture(scope="module")
def many_texts(model, many):
    return model.class_features(many.classes, ["a photo of {}"])


def noise(model, many, texts):
    return explore.noise_view(model, many, texts, index=1, sigma=0.1)


def adapters(model, many, texts):
    chosen = {"adapter": "same", "index": 1, "corruption": "contrast", "severity": 2}
    return explore.adapters_view(model, {"same": model}, many, texts, **chosen)


def methods(model, many, texts):
    table = pd.DataFrame({"method": "A", "sigma": 0.25, "radius": [0.0, 0.1], "certified_accuracy": [0.5, 0.4]})
    starts = {"words": text_prompts(model, many.classes, "a photo of {}")}
    shown = explore.Adaptation(model, many, starts, n_adapt=4, n0=2, n=10)
    chosen = {"method": "A", "sigma": 0.25, "index": 0, "start": "words", "steps": 1}
    return explore.methods_view(table.assign(guarantee="standard"), shown, **chosen)


@pytest.mark.parametrize("view", [noise, adapters, methods])
def test_a_view_keeps_its_size_names_the_truth_and_says_what_it_leaves_out(model, many, many_texts, overlaps, view):
    figure = view(model, many, many_texts)
    assert max(figure.get_size_inches()) < 12
    named = [text.get_text() for ax in figure.axes for text in ax.texts if text.get_text().startswith("thing ")]
    assert len(named) == 24 and f"thing {TRUTH}" in named
    assert any(TOLD in ax.get_xlabel() for ax in figure.axes)
    assert overlaps(figure) == ([], [])

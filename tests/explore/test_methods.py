import numpy as np
import pandas as pd
import pytest
import torch

from medrobust_lib import explore
from medrobust_lib.smoothing.methods import AdaptationFeatures, AdaptedPrompts
from medrobust_lib.smoothing.noise import NoiseStream
from medrobust_lib.smoothing.prompts import text_prompts

METHODS = {"zero-shot": "standard", "candidate set": "candidate-set", "PromptSmooth": "frozen-prompt"}


@pytest.fixture(scope="module")
def table():
    rows = [
        {"method": name, "guarantee": guarantee, "sigma": sigma, "radius": r, "certified_accuracy": 0.9 - r - i / 10}
        for i, (name, guarantee) in enumerate(METHODS.items())
        for sigma in (0.25, 0.5)
        for r in (0.0, 0.1, 0.25)
        if (name, sigma) != ("candidate set", 0.5)
    ]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def adaptation(model, data):
    starts = {f"prompt {k}": text_prompts(model, data.classes, data.templates[k]) for k in range(2)}
    return explore.Adaptation(model, explore.few_images(data, 3), starts, n_adapt=12, n0=4, n=12)


CHOSEN = {"method": "PromptSmooth", "sigma": 0.25, "index": 0, "start": "prompt 0", "steps": 2}


def words(figure):
    return "\n".join(text.get_text() for text in figure.texts)


def test_the_chosen_method_is_highlighted_and_its_guarantee_named(table, adaptation):
    for name, guarantee in METHODS.items():
        figure = explore.methods_view(table, adaptation, **CHOSEN | {"method": name})
        lines = figure.axes[0].lines
        broad = max(lines, key=lambda line: line.get_linewidth())
        rows = table[(table.method == name) & (table.sigma == 0.25)]
        np.testing.assert_allclose(broad.get_ydata(), rows.certified_accuracy)
        assert len({line.get_color() for line in lines if line is not broad}) == 1
        assert len(lines) == 3
        assert f"Guarantee ({guarantee}):" in words(figure)


def test_a_method_without_certificates_at_this_sigma_is_said_to_have_none(table, adaptation):
    figure = explore.methods_view(table, adaptation, **CHOSEN | {"method": "candidate set", "sigma": 0.5})
    assert [text.get_text() for text in figure.axes[0].texts] == ["the table has no 'candidate set' at sigma = 0.5"]


def test_the_frozen_prompt_guarantee_is_named_whatever_method_is_chosen(table, adaptation):
    figure = explore.methods_view(table, adaptation, **CHOSEN | {"method": "zero-shot"})
    assert "guarantee (frozen-prompt): the prompt was fitted to this very image" in words(figure)


def test_no_step_is_the_prompt_itself_and_a_step_is_that_of_the_library(model, adaptation):
    data, start = adaptation.dataset, adaptation.starts["prompt 1"]
    none = adaptation.class_features("prompt 1", 2, sigma=0.25, steps=0)
    torch.testing.assert_close(none, start.class_features(model))
    one = adaptation.class_features("prompt 1", 2, sigma=0.25, steps=1)
    stream = NoiseStream(0, data.id, int(data.indices[2]), 0.25, "adapt")
    views = AdaptationFeatures.draw(model, adaptation.encoded.pixels(2), stream, count=12)
    classify = AdaptedPrompts("a", model, start, n_adapt=12).classifier(views)
    some = torch.nn.functional.normalize(torch.randn(200, one.shape[1], generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close((some @ one.T).argmax(1), classify(some))
    assert not torch.equal(none, one)


def test_steps_move_the_probabilities_and_lower_the_entropy(table, adaptation):
    still = explore.methods_view(table, adaptation, **CHOSEN | {"steps": 0})
    moved = explore.methods_view(table, adaptation, **CHOSEN | {"steps": 4})
    count = len(adaptation.dataset.classes)
    before, after = ([bar.get_width() for bar in figure.axes[2].patches] for figure in (still, moved))
    np.testing.assert_allclose(before[:count], before[count:])
    np.testing.assert_allclose(after[:count], before[:count])
    assert np.abs(np.subtract(after[count:], before[count:])).max() > 1e-3
    first, last = moved.axes[2].get_xlabel().split("entropy ")[1].removesuffix(" nats").split(" to ")
    assert float(last) < float(first)


def test_every_control_changes_the_picture(table, adaptation, capsys):
    instrument = explore.explore_methods(table, adaptation)
    assert "prepare the instrument: 6 of 6" in capsys.readouterr().out
    seen = [instrument.picture.value]
    for name, value in (("method", "zero-shot"), ("sigma", 0.5), ("index", 1), ("start", "prompt 1"), ("steps", 5)):
        instrument.controls[name].value = value
        seen.append(instrument.picture.value)
    assert len(set(seen)) == len(seen)
    assert instrument.message.value == ""


def test_after_preparation_no_image_is_encoded(table, adaptation, model, monkeypatch):
    instrument = explore.explore_methods(table, adaptation)
    monkeypatch.setattr(type(model), "encode_image", None)
    for index in range(3):
        for sigma in (0.25, 0.5):
            instrument.controls["index"].value, instrument.controls["sigma"].value = index, sigma
            assert instrument.message.value == ""


def test_few_images_are_of_different_classes(data):
    few = explore.few_images(data, 4)
    assert len(set(few.labels.tolist())) == len(few) == 4
    assert len(explore.few_images(data, 100)) == len(data)


def test_long_names_do_not_run_into_anything(model, histology, table, overlaps):
    starts = {"hand-written prompt": text_prompts(model, histology.classes, histology.templates[0])}
    adaptation = explore.Adaptation(model, histology, starts, n_adapt=4, n0=2, n=10)
    index = int((histology.labels == 8).argmax())
    figure = explore.methods_view(table, adaptation, **CHOSEN | {"start": "hand-written prompt", "index": index})
    assert overlaps(figure) == ([], [])

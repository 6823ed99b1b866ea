import numpy as np
import pytest

from medrobust_lib import explore


def test_values_are_those_of_the_model_and_probabilities_sum_to_one(model, data):
    prompts = ["a neutrophil", "a platelet", "a dog"]
    figure = explore.similarity_view(model, data, index=2, prompts=prompts)
    _, dots, bars = figure.axes
    cosine = (model.encode_image(model.prepare(data.images[2:3])) @ model.encode_text(prompts).T)[0]
    shown = dots.collections[-1].get_offsets()[:, 0]
    np.testing.assert_allclose(shown, cosine.detach().numpy(), atol=1e-5)
    widths = np.array([bar.get_width() for bar in bars.patches])
    np.testing.assert_allclose(widths, (float(model.logit_scale) * cosine).softmax(0).detach().numpy(), atol=1e-5)


def test_one_colour_marks_the_closest_prompt(model, data):
    figure = explore.similarity_view(model, data, index=2, prompts=["a neutrophil", "a platelet"])
    bars = figure.axes[2].patches
    widest = max(bars, key=lambda bar: bar.get_width())
    others = {bar.get_facecolor() for bar in bars if bar is not widest}
    assert widest.get_facecolor() not in others


def test_no_prompt_is_refused(model, data):
    with pytest.raises(ValueError, match="no prompt: give at least one"):
        explore.similarity_view(model, data, index=0, prompts=[])


def test_of_many_prompts_the_closest_are_shown_with_their_share_of_all(model, data, overlaps):
    prompts = [f"a photo of thing {number}" for number in range(200)]
    figure = explore.similarity_view(model, data, index=0, prompts=prompts)
    features = model.encode_image(model.prepare(data.images[:1]))
    expected = model.probabilities(features, model.encode_text(prompts))[0].numpy()
    shown = [bar.get_width() for bar in figure.axes[2].patches]
    kept = np.sort(np.argsort(-expected, kind="stable")[:24])
    np.testing.assert_allclose(shown, expected[kept], atol=1e-5)
    assert figure.axes[1].get_xlabel().endswith("the 24 closest of 200")
    assert figure.get_size_inches()[1] < 9
    assert overlaps(figure) == ([], [])


def test_long_prompts_and_names_do_not_run_into_anything(model, histology, overlaps):
    index = int((histology.labels == 8).argmax())
    sentences = [histology.templates[0].replace("{}", name) for name in histology.classes]
    figure = explore.similarity_view(model, histology, index=index, prompts=sentences)
    assert overlaps(figure) == ([], [])


def test_moving_the_slider_and_editing_the_prompts_change_the_picture(model, data):
    instrument = explore.explore_similarity(model, data)
    seen = [instrument.picture.value]
    instrument.controls["index"].value = 3
    seen.append(instrument.picture.value)
    instrument.controls["prompts"].value = "one prompt\nanother prompt"
    seen.append(instrument.picture.value)
    assert len(set(seen)) == 3
    assert instrument.message.value == ""


def test_empty_prompts_fall_back_to_the_classes(model, data, monkeypatch):
    asked = []
    real = explore.methods.similarity_view
    monkeypatch.setattr(
        explore.methods,
        "similarity_view",
        lambda *a, prompts, **k: asked.append(prompts) or real(*a, prompts=prompts, **k),
    )
    instrument = explore.explore_similarity(model, data, template="a smear of {}")
    instrument.controls["prompts"].value = " \n"
    assert asked[-1] == [f"a smear of {name}" for name in data.classes]

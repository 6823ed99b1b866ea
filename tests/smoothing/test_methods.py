import dataclasses

import pytest
import torch
from torch.nn import functional

from medrobust_lib.models.weights import fingerprint
from medrobust_lib.smoothing.methods import (
    AdaptationFeatures,
    FixedPrompts,
    PromptClassifier,
    zero_shot_methods,
)
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies


@pytest.fixture(scope="module")
def texts(model, data):
    return model.class_features(data.classes, data.templates[:1])


@pytest.fixture(scope="module")
def features():
    return functional.normalize(torch.randn(60, 128, generator=torch.Generator().manual_seed(0)), dim=1)


def stream(role):
    return NoiseStream(0, "phantom/blood", 3, 0.1, role)


# Fixed prompts


def test_fixed_prompts_answer_the_most_probable_class(model, texts, features):
    answers = FixedPrompts("zero-shot", texts).classifier()(features)
    assert torch.equal(answers, model.probabilities(features, texts).argmax(1))
    assert answers.dtype == torch.int64
    assert len(answers.unique()) > 3


def test_the_image_is_ignored_by_fixed_prompts(texts, features):
    method = FixedPrompts("zero-shot", texts)
    adaptation = AdaptationFeatures(features, stream("adapt"))
    assert torch.equal(method.classifier(adaptation)(features), method.classifier(None)(features))
    assert (method.guarantee, method.n_adapt, method.denoiser) == ("standard", 0, None)


def test_features_in_half_precision_are_compared_in_single(texts, features):
    answers = FixedPrompts("zero-shot", texts.half()).classifier()(features.half())
    expected = (features.half().float() @ texts.half().float().T).argmax(1)
    assert torch.equal(answers, expected)


@pytest.mark.parametrize(
    "broken",
    [lambda x: 2 * x, lambda x: x[0], lambda x: x[None], lambda x: torch.zeros_like(x), lambda x: x * torch.nan],
    ids=["scaled", "one", "batch", "zero", "NaN"],
)
def test_class_features_must_have_norm_one(texts, broken):
    message = r"method 'mine': class_features must be unit-norm \[K, d\], got .*model\.class_features"
    with pytest.raises(ValueError, match=message):
        FixedPrompts("mine", broken(texts))


def test_the_record_tells_what_shapes_the_answers(texts):
    def denoise(pixels, sigma):
        return pixels

    denoise.id = "identity-1"
    record = FixedPrompts("mine", texts, denoiser=denoise).record()
    assert record == {
        "name": "mine",
        "guarantee": "standard",
        "class_features": fingerprint([texts]),
        "denoiser": "identity-1",
    }
    assert FixedPrompts("mine", texts).record()["denoiser"] is None


def test_a_denoiser_without_a_name_cannot_be_recorded(texts):
    method = FixedPrompts("mine", texts, denoiser=lambda pixels, sigma: pixels)
    with pytest.raises(ValueError, match=r"has no `id`, so a store cannot tell it from another one; set its attribute"):
        method.record()


# Adaptation features


@pytest.mark.parametrize("role", ["select", "estimate"])
def test_noise_of_a_certificate_cannot_reach_a_prompt(model, features, role):
    message = f"noise of role '{role}' belongs to the certificate; prompts may only be fitted to noise of role 'adapt'"
    with pytest.raises(ValueError, match=message):
        AdaptationFeatures(features, stream(role))
    with pytest.raises(ValueError, match=message):
        AdaptationFeatures.draw(model, torch.zeros(3, 64, 64), stream(role), count=2)


def test_adaptation_features_are_those_of_the_noisy_copies(model, data):
    pixels = model.prepare(data.images[:1])[0]
    found = AdaptationFeatures.draw(model, pixels, stream("adapt"), count=5)
    expected = model.encode_image(noisy_copies(pixels, stream("adapt"), count=5))
    torch.testing.assert_close(found.features, expected, atol=1e-5, rtol=0)
    assert found.stream == stream("adapt")


def test_adaptation_features_can_take_part_in_a_gradient(model, data, texts):
    pixels = model.prepare(data.images[:1])[0]
    found = AdaptationFeatures.draw(model, pixels, stream("adapt"), count=4)
    prompt = texts.clone().requires_grad_(True)
    with torch.enable_grad():
        model.probabilities(found.features, prompt).log().mean().backward()
    assert prompt.grad.abs().sum() > 0
    assert not found.features.requires_grad


# A base classifier of pixels


def test_a_prompt_classifier_maps_pixels_to_labels(model, data, texts):
    classifier = PromptClassifier(model, texts)
    pixels = model.prepare(data.images)
    expected = model.probabilities(model.encode_image(pixels), texts).argmax(1)
    assert torch.equal(classifier(pixels), expected)
    assert (classifier.id, classifier.dtype) == ("demo-clip", "float32")


def test_a_prompt_classifier_refuses_features_of_another_norm(model, data, texts):
    with pytest.raises(ValueError, match="method 'demo-clip': class_features must be unit-norm"):
        PromptClassifier(model, 3 * texts)(model.prepare(data.images[:1]))


# Zero-shot methods


def test_zero_shot_methods_are_the_first_template_and_the_ensemble(model, data, texts):
    first, ensemble = zero_shot_methods(model, data)
    assert (first.name, ensemble.name) == ("zero-shot", "zero-shot ensemble")
    torch.testing.assert_close(first.class_features, texts)
    torch.testing.assert_close(ensemble.class_features, model.class_features(data.classes, data.templates))
    assert not torch.allclose(first.class_features, ensemble.class_features, atol=1e-3)


def test_one_template_needs_no_ensemble(model, data):
    (only,) = zero_shot_methods(model, dataclasses.replace(data, templates=data.templates[:1]))
    assert only.name == "zero-shot"

"""A tower without finite features answers class 0 to everything, so whatever votes would take it for a sure model."""

import copy
import re

import pytest
import torch

import medrobust_lib as mr
from medrobust_lib.adaptation.retraining import linear_probe
from medrobust_lib.evaluation import Candidate, corruption_answers
from medrobust_lib.models.dual_encoder import BrokenFeaturesError, DualEncoder
from medrobust_lib.models.geometry import Preprocessing
from medrobust_lib.smoothing.methods import AdaptedPrompts, FixedPrompts, PromptClassifier
from medrobust_lib.smoothing.noise import NoiseStream, vote
from medrobust_lib.smoothing.paper_methods import adapt_to_pool
from medrobust_lib.smoothing.prompts import PromptSet, learn_prompts, text_prompts

FEW = {"epochs": 1, "shots": 1, "draws_per_image": 1}


@pytest.fixture(scope="module")
def features(model, data):
    return model.class_features(data.classes, data.templates[:1])


def broken(model, tower, value=float("nan")):
    """A copy of the model whose tower ends in this value."""
    model = copy.deepcopy(model)
    network = model.model
    ends = {"image": [*network.visual.attnpool.c_proj.parameters()], "text": [network.text_projection]}[tower]
    with torch.no_grad():
        for weights in ends:
            weights.fill_(value)
    return model


@pytest.fixture(scope="module")
def blind(model):
    return broken(model, "image")


@pytest.fixture(scope="module")
def mute(model):
    return broken(model, "text")


def test_a_projection_that_leaves_the_range_of_float16_is_named_with_its_remedy(model, data):
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.model.visual.attnpool.c_proj.weight.mul_(5e4)
    pixels = scaled.prepare(data.images)
    with pytest.raises(BrokenFeaturesError, match=r"demo-clip in float16: .* 8 of 8 images .*dtype='float32'"):
        copy.deepcopy(scaled).half().encode_image(pixels)
    for dtype in (torch.float32, torch.bfloat16):  # what the message advises
        found = copy.deepcopy(scaled).to(dtype).encode_image(pixels)
        assert torch.allclose(found, model.encode_image(pixels), atol=0.1)
        assert torch.allclose(found.norm(dim=1), torch.ones(8), atol=1e-5)


USES = {
    "certify": lambda m, d, f: mr.certify(PromptClassifier(m, f), m.prepare(d.images)[0], sigma=0.25, n=20, n0=5),
    "predict": lambda m, d, f: mr.predict(PromptClassifier(m, f), m.prepare(d.images)[0], sigma=0.25, n=20),
    "certify_dataset": lambda m, d, f: mr.certify_dataset(m, d, [FixedPrompts("own", f)], sigmas=[0.25], n=20, n0=5),
    "vote": lambda m, d, f: vote(m, f, m.prepare(d.images)[0], NoiseStream(0, "x", 0, 0.25, "select"), n=4),
    "corruption_answers": lambda m, d, f: corruption_answers({"m": Candidate(m, f)}, d, severities=[1]),
    "learn_prompts": lambda m, d, f: learn_prompts(m, d, **FEW),
    "adapt_to_pool": lambda m, d, f: adapt_to_pool(m, text_prompts(m, d.classes, "an image of {}."), d, sigma=0.25),
    "per-image prompts": lambda m, d, f: mr.certify_dataset(
        m, d, [AdaptedPrompts("own", m, text_prompts(m, d.classes, "an image of {}."), n_adapt=2)], sigmas=[0.25], n=20
    ),
    "linear_probe": lambda m, d, f: linear_probe(m, d, validation=mr.load_dataset("phantom/blood", split="val", n=8)),
}


@pytest.mark.parametrize("use", USES)
def test_nothing_votes_or_learns_with_images_that_have_no_features(blind, data, features, use):
    with pytest.raises(BrokenFeaturesError, match=r"demo-clip in float32: the features of (\d+) of \1 images"):
        USES[use](blind, data, features)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, 1e-20, 1e30])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_every_feature_without_a_direction_is_refused(model, data, tower, value):
    model = broken(model, tower, value)
    with pytest.raises(BrokenFeaturesError, match=r"features of (8 of 8 images|2 of 2 texts) are not finite or"):
        model.encode_image(model.prepare(data.images)) if tower == "image" else model.encode_text(["one", "two"])


def test_probabilities_of_what_is_not_finite_are_refused(model, data, features):
    """With a gradient features are not looked at, and an own encoder may hand out anything."""
    images = model.encode_image(model.prepare(data.images))
    images[3:5], texts = torch.nan, features.clone()
    with pytest.raises(BrokenFeaturesError, match="features of 2 of 8 images and of 0 of 8 classes are not finite"):
        model.probabilities(images.requires_grad_(), texts)
    texts[0, 0] = torch.inf
    with pytest.raises(BrokenFeaturesError, match="of 0 of 3 images and of 1 of 8 classes"):
        model.probabilities(images[:3], texts)


def test_only_the_broken_rows_are_counted(model, data):
    class Patchy(type(model)):
        def _image_features(self, pixels):
            features = super()._image_features(pixels).clone()
            features[2:5] = float("nan")
            return features

    patchy = copy.deepcopy(model)
    patchy.__class__ = Patchy
    with pytest.raises(BrokenFeaturesError, match="of 3 of 8 images"):
        patchy.encode_image(patchy.prepare(data.images))


TEXT_USES = {
    "class_features": lambda m, d: m.class_features(d.classes, d.templates),
    "certify_dataset": lambda m, d: mr.certify_dataset(m, d, sigmas=[0.25], n=20, n0=5),
    "per-image prompts": lambda m, d: USES["per-image prompts"](m, d, None),
}


@pytest.mark.parametrize("use", TEXT_USES)
def test_texts_without_features_are_no_classes(mute, data, use):
    with pytest.raises(BrokenFeaturesError, match=r"the features of \d+ of \d+ texts"):
        TEXT_USES[use](mute, data)


@pytest.mark.parametrize("use", ["learn_prompts", "adapt_to_pool"])
def test_prompts_learned_with_a_broken_text_tower_are_not_handed_out(mute, data, use):
    with pytest.raises(ValueError, match="context values are not finite.*lower learning_rate.*float32"):
        USES[use](mute, data, None)


def test_prompts_that_diverged_are_not_handed_out_either(model, data):
    with pytest.raises(ValueError, match="640 of 640 context values are not finite"):
        learn_prompts(model, data, epochs=3, shots=1, draws_per_image=1, learning_rate=1e38, n_context=5)


def test_a_saved_context_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="prompts for m: 4 of 8 context values"):
        PromptSet(torch.tensor([[1.0, float("nan")] * 2, [float("inf"), 0, 0, float("nan")]]), ("a", "b"), "m")


def test_a_denoiser_that_breaks_is_named_as_a_suspect(model, data, features):
    def denoise(noisy, sigma):
        return noisy * float("nan")

    method = FixedPrompts("denoised", features, denoiser=denoise)
    with pytest.raises(ValueError, match=r"NaN or infinite values in image 0 .*the denoiser in front of the model"):
        mr.certify_dataset(model, data, [method], sigmas=[0.25], n=20, n0=5)


def test_an_own_encoder_that_lets_nan_through_gets_no_vote(model, data, features):
    class Own(type(model)):
        def encode_image(self, pixels):
            return super().encode_image(pixels) * torch.nan

    own = copy.deepcopy(model)
    own.__class__ = Own
    certificate = mr.certify(PromptClassifier(own, features), own.prepare(data.images)[0], sigma=0.25, n=20, n0=5)
    assert (certificate.abstained, certificate.k, certificate.radius) == (True, 0, 0)


def test_ordinary_features_are_torchs_own_to_the_bit(model, data):
    pixels = model.prepare(data.images)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (model.preprocessing.mean, model.preprocessing.std))
    raw = model.model.encode_image(torch.addcmul(-mean / std, pixels, 1 / std))
    assert torch.equal(model.encode_image(pixels), torch.nn.functional.normalize(raw, dim=-1))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_scale_that_is_no_scale_is_refused(scale):
    class Encoder(DualEncoder):
        _image_features = tokenize = embed_tokens = _text_features = None

    with pytest.raises(ValueError, match=re.escape(f"x: logit_scale={scale} is not finite and above 0")):
        Encoder(
            id="x", preprocessing=Preprocessing(8, "squash", "bicubic", mean=(0.5,) * 3, std=(0.5,) * 3), embed_dim=1,
            context_length=4, logit_scale=scale, provenance={},
        )  # fmt: skip

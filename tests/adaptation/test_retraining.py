"""Re-training of the image tower on noisy images: what changes, what does not, what it is good for, its files."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

import medrobust_lib as mr
from medrobust_lib.adaptation.retraining import retrain_on_noise
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.models.dual_encoder import DualEncoder, Preprocessing, Tokens
from medrobust_lib.smoothing.noise import NoiseStream, noisy_features
from medrobust_lib.smoothing.prompts import learn_prompts

SIGMA = 0.5
CLASSES = ("ab", "cd", "ef")


class LetterEncoder(DualEncoder):
    """A small convolutional tower, letters for texts, and layers that training could leak into."""

    def __init__(self, seed=0, norm=True):
        grey = Preprocessing(8, "squash", "bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)
        super().__init__(
            id="letters", preprocessing=grey, embed_dim=8, context_length=12, logit_scale=10.0,
            provenance={"source": "a test"},
        )  # fmt: skip
        norms = [nn.BatchNorm2d(12), nn.BatchNorm1d(12, affine=False)] if norm else [nn.Identity(), nn.Identity()]
        self.convolution = nn.Sequential(nn.Conv2d(3, 12, 4, stride=2), norms[0], nn.ReLU(), nn.Flatten())
        self.middle = nn.Sequential(nn.Linear(108, 12), norms[1], nn.Dropout(0.9), nn.GELU())
        self.letters = nn.Embedding(128, 12)
        self.words = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(12), nn.Linear(12, 12))
        self.shared = nn.Linear(12, 8)
        self.temperature = nn.Parameter(torch.tensor(10.0))
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0, 0.4, generator=generator)
        self.eval().requires_grad_(False)

    def _image_features(self, pixels):
        return self.shared(self.middle(self.convolution(pixels)))

    def tokenize(self, texts):
        ids = torch.zeros(len(texts), max(len(text) for text in texts), dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = torch.tensor([ord(letter) for letter in text])
        return Tokens(ids, ids > 0)

    def embed_tokens(self, tokens):
        return self.letters(tokens.ids)

    def _text_features(self, embeddings, tokens):
        return self.shared(self.words((embeddings * tokens.mask[..., None]).sum(dim=1)))


class FixedEncoder(LetterEncoder):
    """An image tower without anything to train."""

    def _image_features(self, pixels):
        return pixels.flatten(1)[:, :8] + 1  # mid-grey, which is zero, has a direction as well


def patterns(seed, n=72, split="train"):
    """Faint stripes along, across, or none at all, on random grey."""
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = np.repeat(draw.integers(90, 130, (n, 1, 1, 3)), 8, axis=1).repeat(8, axis=2)
    images[labels == 0, ::2] += 60
    images[labels == 1, :, ::2] += 60
    return ImageDataset(
        id="folder:stripes", split=split, images=images.astype(np.uint8), labels=labels.astype(np.int64),
        classes=CLASSES, templates=("a {}", "{} b"), modality="drawing", licence="CC0-1.0", provenance={},
        indices=np.arange(n, dtype=np.int64),
    )  # fmt: skip


def accuracy(model, data, sigma):
    features = noisy_features(model, data, sigma=sigma, role="estimate", seed=99)
    texts = model.class_features(data.classes, data.templates[:1])
    return float(((features @ texts.T).argmax(1).numpy() == data.labels).mean())


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def model():
    return LetterEncoder()


@pytest.fixture(scope="module")
def train():
    return patterns(0)


@pytest.fixture(scope="module")
def retrained(model, train):
    return retrain_on_noise(model, train, sigma=SIGMA, epochs=30, learning_rate=0.01)


# What changes


def test_only_the_image_tower_changes_and_all_of_it(model, retrained):
    tower = {name for name in model.state_dict() if name.startswith(("convolution", "middle"))}
    assert changed(model.state_dict(), retrained.state_dict()) == tower
    assert "middle.1.running_var" in tower  # of a batch normalisation without parameters of its own
    texts = ["ab", "a cd"]
    assert torch.equal(retrained.encode_text(texts), model.encode_text(texts))


@pytest.mark.filterwarnings("ignore:re-training letters")
def test_the_given_model_is_left_as_it_was(train):
    model = LetterEncoder()
    before = tensors(model)
    retrain_on_noise(model, train, sigma=SIGMA, epochs=2)
    assert not changed(before, model.state_dict())
    assert (model.id, model.provenance) == ("letters", {"source": "a test"})
    assert not any(part.training for part in model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_the_copy_is_frozen_and_ready_for_certificates(model, retrained):
    assert isinstance(retrained, LetterEncoder)
    assert not any(part.training for part in retrained.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in retrained.parameters())
    assert [part.momentum for part in retrained.modules() if isinstance(part, nn.BatchNorm2d)] == [0.1]
    data = patterns(5, n=4)
    certificate = mr.certify(
        lambda pixels: (retrained.encode_image(pixels) @ retrained.class_features(CLASSES, ["a {}"]).T).argmax(1),
        retrained.prepare(data.images)[0], sigma=SIGMA, n0=20, n=200, alpha=0.01,
    )  # fmt: skip
    assert certificate.guarantee == "standard"


def test_the_recipe_is_kept(model, train, retrained):
    recipe = retrained.provenance
    assert retrained.id == "letters retrained at sigma 0.5"
    assert {key: recipe[key] for key in ("dataset", "split", "shots", "templates", "sigma", "epochs", "seed")} == {
        "dataset": "folder:stripes", "split": "train", "shots": None, "templates": ["a {}"], "sigma": SIGMA,
        "epochs": 30, "seed": 0,
    }  # fmt: skip
    assert recipe["images"] == list(range(72))
    assert (recipe["base"]["id"], recipe["base"]["source"]) == ("letters", "a test")
    assert recipe["last_loss"] < recipe["first_loss"]
    json.dumps(recipe)


# What it is good for


@pytest.mark.parametrize("norm", [True, False])
def test_retraining_raises_accuracy_under_noise(train, norm):
    model = LetterEncoder(norm=norm)
    held_out = patterns(1, n=300, split="val")
    after = retrain_on_noise(model, train, sigma=SIGMA, epochs=30, learning_rate=0.01)
    assert accuracy(model, held_out, SIGMA) < 0.5
    assert accuracy(after, held_out, SIGMA) > 0.6


def test_training_at_the_noise_level_beats_training_without_noise(model, train, retrained):
    held_out = patterns(1, n=300, split="val")
    clean = retrain_on_noise(model, train, sigma=0, epochs=30, learning_rate=0.01)
    assert clean.id == "letters retrained at sigma 0"
    assert accuracy(clean, held_out, 0) > 0.9
    assert accuracy(retrained, held_out, SIGMA) > accuracy(clean, held_out, SIGMA) + 0.1


def test_demo_clip_learns_from_a_few_noisy_shots():
    model = mr.load_model("demo-clip", device="cpu")
    train = mr.load_dataset("phantom/histology", split="train", n=144)
    held_out = mr.load_dataset("phantom/histology", split="val", n=90)
    before = tensors(model)
    after = retrain_on_noise(model, train, sigma=0.5, shots=16, epochs=6)
    assert accuracy(after, held_out, 0.5) > accuracy(model, held_out, 0.5) + 0.1
    assert all(name.startswith("model.visual.") for name in changed(before, after.state_dict()))
    assert not changed(before, model.state_dict())


# What decides the weights


def test_the_seed_decides_everything(model, train):
    change = {"sigma": SIGMA, "shots": 8, "epochs": 2, "learning_rate": 1e-3}
    with pytest.warns(UserWarning, match="no better than guessing"):
        first = tensors(retrain_on_noise(model, train, **change))
        torch.manual_seed(5)  # the global stream plays no part, nor do gradients that are switched off outside
        before = torch.get_rng_state()
        with torch.inference_mode():
            assert not changed(first, tensors(retrain_on_noise(model, train, **change)))
        assert torch.equal(torch.get_rng_state(), before)
        assert changed(first, tensors(retrain_on_noise(model, train, seed=1, **change)))


@pytest.mark.filterwarnings("ignore:re-training letters")
def test_each_epoch_sees_fresh_noise_of_the_role_adapt(model, train, monkeypatch):
    seen = []
    encode_image = LetterEncoder.encode_image
    monkeypatch.setattr(
        LetterEncoder, "encode_image", lambda self, pixels: seen.append(pixels) or encode_image(self, pixels)
    )
    three = train.subset([10, 20, 30])
    retrain_on_noise(model, three, sigma=SIGMA, epochs=2, seed=6)
    for epoch, step in enumerate(seen[-2:]):
        for image, index in zip(model.prepare(three.images), (10, 20, 30), strict=True):
            stream = NoiseStream(6, "folder:stripes", index, SIGMA, "adapt")
            expected = image + stream.draw(tuple(image.shape), first=epoch)[0]
            assert any(torch.equal(row, expected) for row in step)


def test_shots_are_those_of_prompt_learning():
    model = mr.load_model("demo-clip", device="cpu")
    data = mr.load_dataset("phantom/breast", split="train", n=40)
    prompts = learn_prompts(model, data, sigmas=(0.1,), shots=3, epochs=1, draws_per_image=1, seed=4)
    after = retrain_on_noise(model, data, sigma=0.1, shots=3, epochs=1, learning_rate=1e-5, seed=4)
    assert after.provenance["images"] == prompts.provenance["images"]


def test_too_few_shots_are_told_and_all_used(model, train):
    with pytest.warns(UserWarning, match=r"3 of 3 classes have fewer images than shots=50 .*; all are used") as told:
        after = retrain_on_noise(model, train, sigma=0, shots=50, epochs=10, learning_rate=0.01)
    assert told[0].filename == __file__
    assert len(after.provenance["images"]) == 72


@pytest.mark.filterwarnings("ignore:re-training letters")
@pytest.mark.parametrize(("images", "batch_size"), [(3, 32), (33, 32), (7, 3), (72, 71)])
def test_no_step_is_left_with_a_single_image(model, images, batch_size, monkeypatch):
    sizes = []
    prepare = LetterEncoder.prepare
    monkeypatch.setattr(LetterEncoder, "prepare", lambda self, some: sizes.append(len(some)) or prepare(self, some))
    retrain_on_noise(model, patterns(0, n=images), sigma=0, epochs=1, batch_size=batch_size, learning_rate=0.3)
    assert sum(sizes) == images
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_half_precision_is_trained_in_float32_and_comes_back(train, monkeypatch):
    seen = []
    features = LetterEncoder._image_features
    monkeypatch.setattr(
        LetterEncoder, "_image_features", lambda self, pixels: seen.append(pixels.dtype) or features(self, pixels)
    )
    model = LetterEncoder(norm=False).to(torch.bfloat16)
    before = tensors(model)
    after = retrain_on_noise(model, train, sigma=SIGMA, epochs=30, learning_rate=0.01)
    assert set(seen) == {torch.float32}
    assert after.dtype == torch.bfloat16
    assert {name.split(".")[0] for name in changed(before, after.state_dict())} == {"convolution", "middle"}
    assert accuracy(after, patterns(1, n=300), SIGMA) > 0.6


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": -0.1}, "sigma=-0.1: smoothing needs noise"),
        ({"sigma": float("nan")}, "sigma=nan: smoothing needs noise"),
        ({"shots": 0}, "shots=0 is no whole number of 1 or more: few-shot learning"),
        ({"epochs": 0}, "epochs=0 is no whole number of 1"),
        ({"batch_size": 0}, "batch_size=0 is no whole number of 1"),
        ({"batch_size": 1}, "batch_size=1: 72 images would be split into steps of one image, .* batch_size of 3"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 is no number above 0"),
        ({"learning_rate": 1e30}, r"training diverged in epoch \d+: lower learning_rate=1e\+30"),
        ({"templates": ["no place"]}, "template 'no place' lacks '{}'"),
    ],
)
def test_impossible_training_is_refused(model, train, change, message):
    with pytest.raises(ValueError, match=message):
        retrain_on_noise(model, train, **({"sigma": SIGMA, "epochs": 3} | change))


def test_data_and_models_that_cannot_be_trained_are_refused(model, train):
    with pytest.raises(ValueError, match="no image of class 'ef' to learn from"):
        retrain_on_noise(model, train.subset(train.labels < 2), sigma=SIGMA)
    with pytest.raises(ValueError, match="label 3 .* is outside the class list"):
        retrain_on_noise(model, dataclasses.replace(train, labels=train.labels + 1), sigma=SIGMA)
    with pytest.raises(ValueError, match=r"LetterEncoder is in training mode.* call .eval\(\) first"):
        retrain_on_noise(LetterEncoder().train(), train, sigma=SIGMA)
    with pytest.raises(ValueError, match="letters: image features depend on no parameter of their own"):
        retrain_on_noise(FixedEncoder(), train, sigma=SIGMA)

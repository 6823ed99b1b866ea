"""What the shipped model must be able to do, and must not be able to do."""

import json

import numpy as np
import pytest
import torch

from medrobust_lib import load_dataset, load_model
from medrobust_lib.doctor import REFERENCE_FILE
from medrobust_lib.metrics import accuracy, accuracy_interval
from medrobust_lib.phantoms import MODALITIES
from medrobust_lib.smoothing.noise import noisy_features

FOLDER = REFERENCE_FILE.parent


@pytest.fixture(scope="module")
def model():
    return load_model("demo-clip", device="cpu")


def zero_shot(model, dataset: str, *, sigma: float = 0.0) -> tuple[float, float, int]:
    """Accuracy, its lower 95 % bound and the number of classes."""
    data = load_dataset(dataset, n=120)
    texts = model.class_features(data.classes, data.templates[:1])
    answers = model.probabilities(noisy_features(model, data, sigma=sigma, role="estimate"), texts).argmax(1).numpy()
    low, _ = accuracy_interval(int((answers == data.labels).sum()), len(data))
    return accuracy(data.labels, answers), low, len(data.classes)


def test_knows_its_own_site(model):
    assert np.mean([zero_shot(model, f"phantom/{modality}-site-a")[0] for modality in MODALITIES]) >= 0.9


def test_meets_a_shift_at_the_other_site_but_stays_above_chance(model):
    results = {modality: zero_shot(model, f"phantom/{modality}") for modality in MODALITIES}
    assert 0.45 <= np.mean([found for found, _, _ in results.values()]) <= 0.85
    for modality, (found, _, k) in results.items():
        assert found > 1 / k, modality


def test_noise_takes_it_to_near_chance(model):
    found = [zero_shot(model, "phantom/histology", sigma=sigma)[0] for sigma in (0.0, 0.25, 1.0)]
    assert found[0] > found[1] > found[2]
    assert found[2] < 2.2 / 9


def test_is_small_and_documented():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8e6
    card = (FOLDER / "MODEL_CARD.md").read_text()
    assert "synthetic phantoms only" in card
    assert "Not for clinical use" in card
    assert "captions that say so" in card
    recipe = json.loads((FOLDER / "recipe.json").read_text())
    log = (FOLDER / "training_log.csv").read_text().splitlines()
    assert log[0] == "epoch,loss,site_a_val_accuracy,logit_scale,seconds,stage"
    assert len(log) == recipe["epochs"] + recipe["noise_epochs"] + 1


def test_any_text_has_tokens_and_unknown_words_still_differ(model):
    features = model.encode_text(["An H&E image patch of mucus.", "Привет", "🫀", ""])
    assert torch.isfinite(features).all()
    assert len(torch.unique(features, dim=0)) == 4


def test_prompts_can_be_learned(model, check_prompts):
    check_prompts(model)

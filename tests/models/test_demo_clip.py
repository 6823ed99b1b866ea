"""What the shipped model must be able to do, and must not be able to do."""

import functools
import json

import numpy as np
import pytest
import torch

from medrobust_lib.doctor import REFERENCE_FILE
from medrobust_lib.metrics import accuracy
from medrobust_lib.phantoms import MODALITIES, phantom_classes
from medrobust_lib.smoothing.noise import noisy_features

FOLDER = REFERENCE_FILE.parent


@pytest.fixture(scope="module")
def zero_shot(model, phantoms):
    """Function giving the accuracy on a set of phantoms."""

    @functools.cache
    def measured(modality: str, *, sigma: float = 0.0) -> float:
        data = phantoms(modality, n=72)  # a multiple of all numbers of classes
        texts = model.class_features(data.classes, data.templates[:1])
        features = noisy_features(model, data, sigma=sigma, role="estimate")
        return accuracy(data.labels, model.probabilities(features, texts).argmax(1).numpy())

    return measured


def test_knows_its_own_site(zero_shot):
    assert np.mean([zero_shot(f"{modality}-site-a") for modality in MODALITIES]) >= 0.9


def test_meets_a_shift_at_the_other_site_but_stays_above_chance(zero_shot):
    results = {modality: zero_shot(modality) for modality in MODALITIES}
    assert 0.45 <= np.mean([*results.values()]) <= 0.85
    for modality, found in results.items():
        assert found > 1 / len(phantom_classes(modality)), modality


def test_noise_takes_it_to_near_chance(zero_shot):
    found = [zero_shot("histology", sigma=sigma) for sigma in (0.0, 0.25, 1.0)]
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

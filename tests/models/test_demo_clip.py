"""What the two shipped dual encoders must be able to do, and must not be able to do."""

import functools
import json
from itertools import pairwise

import numpy as np
import pytest
import torch

import medrobust_lib as mr
from medrobust_lib.metrics import mcnemar_p
from medrobust_lib.models.weights import DEMO_FOLDER
from medrobust_lib.phantoms import MODALITIES, phantom_classes
from medrobust_lib.smoothing.noise import noisy_features

IDS = ("demo-clip", "demo-clip-vit")


@pytest.fixture(scope="module")
def demo():
    return {id: mr.load_model(id, device="cpu") for id in IDS}


@pytest.fixture(scope="module")
def right(demo, phantoms):
    """Function telling which images of a set of phantoms a model names right."""

    @functools.cache
    def measured(id: str, modality: str, *, sigma: float = 0.0) -> np.ndarray:
        data, model = phantoms(modality, n=72), demo[id]  # a multiple of all numbers of classes
        texts = model.class_features(data.classes, data.templates[:1])
        features = noisy_features(model, data, sigma=sigma, role="estimate")
        return model.probabilities(features, texts).argmax(1).numpy() == data.labels

    return measured


@pytest.mark.parametrize("id", IDS)
def test_knows_its_own_site(right, id):
    assert np.mean([right(id, f"{modality}-site-a") for modality in MODALITIES]) >= 0.9


@pytest.mark.parametrize("id", IDS)
def test_meets_a_shift_at_the_other_site_but_stays_above_chance(right, id):
    results = {modality: right(id, modality).mean() for modality in MODALITIES}
    own = np.mean([right(id, f"{modality}-site-a") for modality in MODALITIES])
    assert 0.45 <= np.mean([*results.values()]) <= own - 0.02
    for modality, found in results.items():
        assert found > 1 / len(phantom_classes(modality)), modality


@pytest.mark.parametrize("id", IDS)
@pytest.mark.parametrize("modality", MODALITIES)
def test_noise_never_helps(right, id, modality):
    for low, high in pairwise((0.0, 0.1, 0.25, 1.0)):
        before, after = (right(id, modality, sigma=sigma) for sigma in (low, high))
        gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
        assert gained <= lost or mcnemar_p(gained, lost) > 0.05, (low, high, gained, lost)


@pytest.mark.parametrize("id", IDS)
def test_noise_takes_it_to_near_chance(right, id):
    found = [right(id, "histology", sigma=sigma).mean() for sigma in (0.0, 0.25, 1.0)]
    assert found[0] > found[1] > found[2]
    assert found[2] < 2.6 / 9


@pytest.mark.parametrize("id", IDS)
def test_the_mildest_loss_of_contrast_leaves_most_blood_cells_their_names(demo, phantoms, id):
    table = mr.benchmark(demo[id], phantoms("blood", n=72), corruptions=["contrast"], severities=[1])
    assert table.loc["contrast", "accuracy"] > 0.7  # one of the two once fell to a seventh


def test_neither_is_better_everywhere(right):
    ahead = {modality: right(IDS[1], modality).mean() - right(IDS[0], modality).mean() for modality in MODALITIES}
    assert min(ahead.values()) < 0 < max(ahead.values()), ahead


def test_they_share_their_texts(demo):
    one, other = (demo[id].encode_text(["An H&E image patch of mucus.", "Привет", "🫀", ""]) for id in IDS)
    assert torch.allclose(one, other, atol=1e-6)
    assert torch.isfinite(one).all()
    assert len(torch.unique(one, dim=0)) == 4  # any text has tokens, and unknown words still differ


@pytest.mark.parametrize("id", IDS)
def test_is_small_and_documented(id):
    folder = DEMO_FOLDER / id
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    card = (folder / "MODEL_CARD.md").read_text()
    assert card.startswith(f"# {id}\n")
    for sentence in ("synthetic phantoms only", "Not for clinical use", "captions that say so", "no caption speaks of"):
        assert sentence in card
    recipe = json.loads((folder / "recipe.json").read_text())
    log = (folder / "training_log.csv").read_text().splitlines()
    assert log[0].startswith("stage,epoch,loss,site_a_val_accuracy,")
    assert len(log) == sum(stage["epochs"] for stage in recipe["stages"]) + 1


def test_all_weights_of_the_demo_are_small():
    assert sum(path.stat().st_size for path in DEMO_FOLDER.rglob("*.safetensors")) <= 14e6


@pytest.mark.parametrize("id", IDS)
def test_prompts_can_be_learned(demo, check_prompts, id):
    check_prompts(demo[id])

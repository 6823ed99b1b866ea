"""Images of several data sets as one series: kept exactly or not at all, and changed in the right order."""

import numpy as np
import psutil
import pytest
import torch

from medrobust_lib.adaptation import training_images
from medrobust_lib.adaptation.training_images import Augmentation, TrainingImages
from medrobust_lib.corruptions.suites import MEDIMETA_C
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.models.geometry import Preprocessing, prepare_images


class Geometry:
    """What training images ask of a model."""

    image_size = 8
    preprocessing = Preprocessing(8, "squash", "bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)

    def prepare(self, images):
        return prepare_images(images, self.preprocessing)


def grain(id, n, seed, side=8):
    """Random pixels."""
    labels = np.arange(n, dtype=np.int64) % 2
    images = np.random.default_rng(seed).integers(60, 200, (n, side, side, 3), dtype=np.uint8)
    return ImageDataset(
        id=id, split="train", images=images, labels=labels, classes=("a", "b"), templates=("{}",), modality="drawing",
        licence="CC0-1.0", provenance={}, indices=np.arange(n, dtype=np.int64),
    )  # fmt: skip


TRAIN = (grain("folder:one", 12, 0), grain("folder:two", 15, 1, side=10))


def test_kept_images_are_exact_or_not_kept(monkeypatch):
    model = Geometry()
    images = TrainingImages(model, TRAIN, budget=27 * 192)
    rows = np.array([20, 3, 11, 12, 20])
    expected = torch.cat([model.prepare(TRAIN[number].images[[row]]) for number, row in
                          ((1, 8), (0, 3), (0, 11), (1, 0), (1, 8))])  # fmt: skip
    assert images.kept.dtype == torch.uint8 and images.bytes == 27 * 192
    assert torch.equal(images.pixels(rows), expected)
    assert torch.equal(TrainingImages(model, TRAIN, budget=27 * 192 - 1).pixels(rows), expected)
    prepare = Geometry.prepare
    monkeypatch.setattr(Geometry, "prepare", lambda self, some: prepare(self, some) * 0.9)
    finer = TrainingImages(model, TRAIN, budget=1 << 30)
    assert finer.kept is None and finer.bytes == 0
    assert torch.equal(finer.pixels(rows), expected * 0.9)


def test_the_budget_follows_free_memory(monkeypatch):
    memory = psutil.virtual_memory()
    for free, budget in ((1 << 40, 1 << 30), (1 << 20, 1 << 18)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: memory._replace(available=free))
        assert training_images.cache_budget() == budget


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_corruptions_come_before_the_models_resize(budget):
    model = Geometry()
    data = [grain("folder:one", 40, 0, side=32), grain("folder:two", 40, 1, side=48)]
    images = TrainingImages(model, data, budget=budget)
    recipe = Augmentation(crop=1, flip=False, corruptions=("brightness",), share=0.5)
    rows = np.arange(80)[::-1].copy()
    draws = {"rng": np.random.default_rng(0), "generator": torch.Generator().manual_seed(0)}
    changed = images.augmented(rows, recipe, **draws) - images.pixels(rows)
    degraded = changed.flatten(1).abs().amax(dim=1) > 0
    assert 25 < degraded.sum() < 55
    assert degraded[:40].any() and degraded[40:].any()
    stored = [image for each in data for image in each.images]
    severities = set()
    for row, found, is_degraded in zip(rows, changed + images.pixels(rows), degraded, strict=True):
        brighter = MEDIMETA_C.corruption("brightness")
        offered = [brighter.apply(stored[row], severity=s, rng=np.random.default_rng(0)) for s in range(1, 6)]
        fitting = [s for s, image in enumerate(offered, 1) if torch.allclose(model.prepare(image[None])[0], found)]
        assert bool(fitting) == bool(is_degraded)
        severities.update(fitting)
    assert severities == {1, 2, 3, 4, 5}


def test_noise_comes_last_and_on_its_share():
    images = TrainingImages(Geometry(), TRAIN, budget=1 << 20)
    recipe = Augmentation(crop=1, flip=False, sigmas=(0.5,), share=0.3)
    rows = np.arange(1000) % 27
    draws = {"rng": np.random.default_rng(0), "generator": torch.Generator().manual_seed(0)}
    noise = images.augmented(rows, recipe, **draws) - images.pixels(rows)
    spread = noise.flatten(1).std(dim=1)
    noisy = spread > 0
    assert 250 < noisy.sum() < 350
    assert ((spread[noisy] - 0.5).abs() < 0.15).all() and abs(float(spread[noisy].mean()) - 0.5) < 0.01

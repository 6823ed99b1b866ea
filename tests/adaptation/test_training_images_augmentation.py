"""Random changes of training images: what they keep, how often they happen, and that generators decide them."""

import numpy as np
import pytest
import torch

from medrobust_lib.adaptation.training_images import (
    Augmentation,
    add_noise,
    corrupt_at_random,
    crop_and_flip,
    draw_degradations,
)
from medrobust_lib.corruptions.suites import MEDIMETA_C


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pixels():
    return torch.rand(200, 3, 16, 16, generator=seeded(9))


def test_generators_decide_everything(pixels):
    recipe = Augmentation(sigmas=(0.1, 0.5))
    before = torch.get_rng_state()
    for change in (crop_and_flip, add_noise):
        first, again, other = (change(pixels, recipe, generator=seeded(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_image_gets_noise_of_one_of_the_levels():
    noise = add_noise(torch.zeros(300, 3, 32, 32), Augmentation(sigmas=(0.1, 0.5)), generator=seeded())
    spread = noise.flatten(1).std(dim=1)
    weak = (spread - 0.1).abs() < 0.01
    assert (weak | ((spread - 0.5).abs() < 0.05)).all()
    assert 110 < weak.sum() < 190
    assert noise.min() < -1 and noise.max() > 1  # nothing is clipped


@pytest.mark.parametrize(
    ("recipe", "shares"),
    [
        (Augmentation(), (1, 0, 0)),
        (Augmentation(sigmas=(0.1,)), (0.5, 0.5, 0)),
        (Augmentation(corruptions=("contrast",), share=0.2), (0.8, 0, 0.2)),
        (Augmentation(sigmas=(0.1,), corruptions=("contrast",), share=0.8), (0.2, 0.4, 0.4)),
        (Augmentation(sigmas=(0.1,), share=1), (0, 1, 0)),
        (Augmentation(sigmas=(0.1,), share=0), (1, 0, 0)),
    ],
)
def test_the_wanted_share_is_degraded(recipe, shares):
    kinds = draw_degradations(recipe, 4000, rng=np.random.default_rng(0))
    assert np.allclose(np.bincount(kinds, minlength=3) / 4000, shares, atol=0.03)


def test_each_corruption_and_severity_is_drawn_equally_often():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    images = np.repeat(image[None], 1000, axis=0)
    before = images.copy()
    corrupted = corrupt_at_random(
        images, Augmentation(corruptions=("brightness", "contrast")), rng=np.random.default_rng(1)
    )
    assert np.array_equal(images, before)
    expected = [
        MEDIMETA_C.corruption(name).apply(image, severity=severity, rng=np.random.default_rng(0))
        for name in ("brightness", "contrast") for severity in (1, 2, 3, 4, 5)
    ]  # fmt: skip
    counts = [sum(np.array_equal(other, each) for other in corrupted) for each in expected]
    assert sum(counts) == 1000 and min(counts) > 70


def test_random_corruptions_differ_between_images_and_follow_the_generator():
    images = np.full((2, 32, 32, 3), 128, np.uint8)
    recipe = Augmentation(corruptions=["gaussian_noise"])
    first, again = (corrupt_at_random(images, recipe, rng=np.random.default_rng(4)) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": 0}, "crop=0: give the least share of the area that is kept"),
        ({"crop": 1.5}, "crop=1.5"),
        ({"share": -0.1}, "share=-0.1: give the share of images"),
        ({"sigmas": (0.1, -1)}, r"sigma=-1\.0: smoothing needs noise, a standard deviation > 0"),
        ({"sigmas": (float("nan"),)}, "sigma=nan"),
        ({"corruptions": ("contrst",)}, "unknown corruption 'contrst' in suite medimeta-c.*contrast"),
    ],
)
def test_impossible_augmentations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**change)

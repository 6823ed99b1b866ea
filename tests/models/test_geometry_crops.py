"""Random crops and mirror images: what they keep, and how often they happen."""

import pytest
import torch

from medrobust_lib.models.geometry import CropAndFlip, crop_and_flip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pixels():
    return torch.rand(200, 3, 16, 16, generator=seeded(9))


@pytest.fixture
def ramps():
    """Images whose red is the x position and whose green is the y position, both from -1 to 1 at the outer edges."""
    line = (torch.arange(64) + 0.5) / 32 - 1
    across, down = line.expand(64, 64), line[:, None].expand(64, 64)
    return torch.stack([across, down, torch.zeros(64, 64)]).expand(2000, 3, 64, 64)


def rectangles(ramps, augmentation):
    """Left, right, top and bottom edge of what was cut out, in units of half a side."""
    cut = crop_and_flip(ramps, augmentation, generator=seeded())
    centre, half = {}, {}
    for channel, axis in ((0, 3), (1, 2)):
        # In the middle of the crop no border is near, where values are repeated.
        low, high = (cut.select(axis, place)[:, channel, 32] for place in (16, 47))
        half[channel], centre[channel] = (high - low) / (31 / 32), (high + low) / 2
    return centre[0], half[0], centre[1], half[1]


def test_crops_lie_in_the_image_and_keep_their_share_and_aspect(ramps):
    x, width, y, height = rectangles(ramps, CropAndFlip(crop=0.6, flip=False))
    area, aspect = width * height, width / height
    assert 0.6 - 1e-4 <= area.min() < 0.61 and 0.99 < area.max() <= 1 + 1e-4
    assert abs(float(area.mean()) - 0.8) < 0.01
    assert 3 / 4 - 1e-3 < aspect.min() < 0.8 and 1.25 < aspect.max() < 4 / 3 + 1e-3
    for centre, side in ((x, width), (y, height)):
        assert (centre.abs() + side <= 1 + 1e-4).all()
        moved = centre / (1 - side).clamp(min=1e-3)  # where in its leeway the rectangle lies
        assert moved.min() < -0.95 and moved.max() > 0.95 and abs(float(moved.mean())) < 0.05


def test_half_of_the_images_are_mirrored_left_to_right(ramps):
    _, width, _, height = rectangles(ramps, CropAndFlip())
    assert 0.45 < (width < 0).float().mean() < 0.55
    assert (height > 0).all()
    assert (width[:20] > 0).any() and (width[:20] < 0).any()


def test_without_a_crop_images_stay_exact(pixels):
    flipped = crop_and_flip(pixels, CropAndFlip(crop=1), generator=seeded())
    same = [torch.equal(a, b) for a, b in zip(flipped, pixels, strict=True)]
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, pixels, strict=True)]
    assert 80 < sum(same) < 120 and sum(same) + sum(mirrored) == 200
    assert torch.equal(crop_and_flip(pixels, CropAndFlip(crop=1, flip=False), generator=seeded()), pixels)


def test_flat_images_stay_flat():
    flat = torch.full((5, 3, 8, 8), 0.7)
    assert torch.allclose(crop_and_flip(flat, CropAndFlip(crop=0.1), generator=seeded()), flat)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"crop": "0.1"}, "crop='0.1'"), ({"crop": True}, "crop=True"), ({"flip": "no"}, "flip='no'")],
)
def test_crops_of_another_type_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        CropAndFlip(**given)

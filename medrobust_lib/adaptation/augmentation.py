"""Random changes of training images: crops and mirror images, and on wish noise and corruptions."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from medrobust_lib.corruptions.suites import MEDIMETA_C, SEVERITIES

_LARGEST_ASPECT = 4 / 3


@dataclass(frozen=True)
class Augmentation:
    """What is changed at random in a training image, anew in every epoch.

    The defaults are those of RobustMedCLIP: crops of 80 to 100 % of the area and mirror images, all clean.

    Attributes
    ----------
    crop : float in (0, 1]
        Least share of the area that a random crop keeps; it is resized back. Its aspect is 3:4 to 4:3. 1 crops nothing.
    flip : bool
        Mirror half of the images left to right.
    sigmas : tuple of float
        Noise levels in [0, 1] pixel units, one of them drawn for each noisy image; nothing is clipped.
    corruptions : tuple of str
        Names of suite "medimeta-c", one of them drawn for each corrupted image, at severity 1 to 5, all equally
        likely. Corrupted is the image as it is stored, before the model's resize.
    share : float in [0, 1]
        Of the images that get noise or a corruption; where both are given, either with the same chance, never both.

    Raises
    ------
    ValueError
        A number out of range, or an unknown corruption (the closest names are given).
    """

    crop: float = 0.8
    flip: bool = True
    sigmas: tuple[float, ...] = ()
    corruptions: tuple[str, ...] = ()
    share: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", tuple(float(sigma) for sigma in self.sigmas))
        names = (self.corruptions,) if isinstance(self.corruptions, str) else tuple(self.corruptions)
        object.__setattr__(self, "corruptions", names)
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop={self.crop}: give the least share of the area that is kept, above 0 and at most 1")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share}: give the share of images that are degraded, 0 to 1")
        for sigma in self.sigmas:
            if not 0 <= sigma < math.inf:
                raise ValueError(f"sigma {sigma}: noise levels are standard deviations >= 0 in [0, 1] pixel units")
        for name in self.corruptions:
            MEDIMETA_C.corruption(name)


PAPER_AUGMENTATION = Augmentation()


def draw_degradations(augmentation: Augmentation, count: int, *, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw which images are degraded, and how.

    Parameters
    ----------
    augmentation : Augmentation
    count : int
        Number of images n.
    rng : numpy.random.Generator

    Returns
    -------
    int64 [n]
        0 leaves an image clean, 1 adds noise, 2 corrupts.
    """
    offered = [kind for kind, given in ((1, augmentation.sigmas), (2, augmentation.corruptions)) if given]
    if not offered:
        return np.zeros(count, np.int64)
    kinds = rng.choice(np.array(offered, np.int64), count)
    return np.where(rng.random(count) < augmentation.share, kinds, 0)


def corrupt_at_random(
    images: NDArray[np.uint8], augmentation: Augmentation, *, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Corrupt each image by a corruption and at a severity of its own.

    Parameters
    ----------
    images : uint8 [n, H, W, 3]
        At least 28 pixels high and wide.
    augmentation : Augmentation
        With at least one corruption.
    rng : numpy.random.Generator

    Returns
    -------
    uint8 [n, H, W, 3]
        A new array.

    Raises
    ------
    ValueError
        Images that are too small to be corrupted.
    """
    corrupted = np.empty_like(images)
    for row, image in enumerate(images):
        corruption = MEDIMETA_C.corruption(augmentation.corruptions[rng.integers(len(augmentation.corruptions))])
        corrupted[row] = corruption.apply(image, severity=int(rng.choice(SEVERITIES)), rng=rng)
    return corrupted


def crop_and_flip(pixels: Tensor, augmentation: Augmentation, *, generator: torch.Generator) -> Tensor:
    """Cut out a random rectangle of each image, resize it back, and mirror half of them.

    Parameters
    ----------
    pixels : float [n, 3, H, W]
    augmentation : Augmentation
    generator : torch.Generator
        On the device of the pixels.

    Returns
    -------
    float [n, 3, H, W]
        Interpolated bilinearly; without a crop every value is one of the image's.
    """
    count = len(pixels)
    mirror = torch.ones(count, device=pixels.device)
    if augmentation.flip:
        mirror -= 2 * (torch.rand(count, generator=generator, device=pixels.device) < 0.5).float()
    if augmentation.crop == 1:
        return torch.where((mirror < 0).view(-1, 1, 1, 1), pixels.flip(3), pixels)
    area, aspect, across, down = torch.rand(4, count, generator=generator, device=pixels.device)
    area = augmentation.crop + (1 - augmentation.crop) * area
    # A wider aspect than 1 / area would need a rectangle wider than the image.
    widest = torch.log(1 / area).clamp(max=math.log(_LARGEST_ASPECT))
    aspect = torch.exp((2 * aspect - 1) * widest)
    width, height = torch.sqrt(area * aspect), torch.sqrt(area / aspect)
    zero = torch.zeros_like(area)
    rows = torch.stack([width * mirror, zero, (1 - width) * (2 * across - 1)], 1)
    columns = torch.stack([zero, height, (1 - height) * (2 * down - 1)], 1)
    grid = functional.affine_grid(torch.stack([rows, columns], 1), list(pixels.shape), align_corners=False)
    return functional.grid_sample(
        pixels, grid.to(pixels.dtype), mode="bilinear", padding_mode="border", align_corners=False
    )


def add_noise(pixels: Tensor, augmentation: Augmentation, *, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise to each image, at a level of its own.

    Parameters
    ----------
    pixels : float [n, 3, H, W]
        In [0, 1], before the model's normalisation.
    augmentation : Augmentation
        With at least one noise level.
    generator : torch.Generator
        On the device of the pixels.

    Returns
    -------
    float [n, 3, H, W]
        Not clipped.
    """
    levels = torch.tensor(augmentation.sigmas, dtype=pixels.dtype, device=pixels.device)
    drawn = torch.randint(len(levels), (len(pixels),), generator=generator, device=pixels.device)
    noise = torch.randn(pixels.shape, generator=generator, dtype=pixels.dtype, device=pixels.device)
    return torch.addcmul(pixels, noise, levels[drawn].view(-1, 1, 1, 1))

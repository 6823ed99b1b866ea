"""Noise corruptions.

A gray image is corrupted as three equal channels with independent noise, then its luma is taken, which is what the
public packages do with gray images: the noise of a gray image is milder than its sigma says.
"""

import numpy as np

from medrobust_lib.corruptions.pixels import Pixels, as_rgb, back_to_gray, on_pixels


@on_pixels
def gaussian_noise(image: Pixels, *, sigma: float, rng: np.random.Generator) -> Pixels:
    """Add N(0, sigma^2) to every channel, clip, truncate (ImageNet-C; Hendrycks and Dietterich 2019).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    sigma : float
        Standard deviation in [0, 1] pixel units.
    rng : numpy.random.Generator

    Returns
    -------
    uint8 of the same shape
    """
    rgb = as_rgb(image)
    noisy = rng.standard_normal(rgb.shape, dtype=np.float32)
    noisy *= 255 * sigma
    noisy += rgb
    return back_to_gray(_truncated(noisy), image)


@on_pixels
def impulse_noise(image: Pixels, *, amount: float, rng: np.random.Generator) -> Pixels:
    """Replace each channel value with probability `amount`, by 0 or 255 with equal chances (salt and pepper).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    amount : float
        Expected share of replaced values, in [0, 1].
    rng : numpy.random.Generator

    Returns
    -------
    uint8 of the same shape
    """
    rgb = as_rgb(image)
    chance = rng.random(rgb.shape, dtype=np.float32)
    noisy = rgb * (chance >= amount / 2)
    noisy |= -(chance >= 1 - amount / 2).view(np.uint8)  # minus one is 255 in uint8
    return back_to_gray(noisy, image)


@on_pixels
def speckle_noise(image: Pixels, *, sigma: float, rng: np.random.Generator) -> Pixels:
    """Multiply every channel value by 1 + N(0, sigma^2), clip, truncate.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    sigma : float
        Relative standard deviation.
    rng : numpy.random.Generator

    Returns
    -------
    uint8 of the same shape
    """
    rgb = as_rgb(image)
    noisy = rng.standard_normal(rgb.shape, dtype=np.float32)
    noisy *= sigma
    noisy += 1
    noisy *= rgb
    return back_to_gray(_truncated(noisy), image)


@on_pixels
def shot_noise(image: Pixels, *, photons: float, rng: np.random.Generator) -> Pixels:
    """Count photons: Poisson noise whose rate is `photons` at full brightness.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    photons : float
        Expected count of a white pixel; fewer is noisier.
    rng : numpy.random.Generator

    Returns
    -------
    uint8 of the same shape
    """
    rgb = as_rgb(image)
    counts = rng.poisson(rgb * (photons / 255))
    return back_to_gray(_truncated(counts * (255 / photons)), image)


def _truncated(values: np.ndarray) -> Pixels:
    """Clip to a byte and cut the fraction off, as the public implementations do."""
    np.clip(values, 0, 255, out=values)
    return values.astype(np.uint8)

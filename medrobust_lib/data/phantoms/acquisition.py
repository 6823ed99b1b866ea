"""Acquisition sites: the same scene seen through two laboratories' equipment.

Site A is where demo-clip was trained, site B is the benchmark. They differ in stain (or detector
response), exposure, contrast, blur and grain, which is what separates two hospitals in practice.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Range = tuple[float, float]


@dataclass(frozen=True)
class Site:
    """How one laboratory records a scene. Every range is drawn uniformly, once per image.

    Attributes
    ----------
    stain : tuple of three floats
        Exponent per RGB channel; scaling the optical density of a stain by ``s`` raises the
        transmitted light to the power ``s``.
    stain_jitter : float
        Standard deviation of the per-image, per-channel change of ``stain``.
    level, spread : Range
        Mean and standard deviation of the recorded intensities, as auto-exposure sets them.
    auto_exposure : float
        Share in [0, 1] of the way from the scene's own mean and spread to ``level`` and ``spread``.
    blur : Range
        Standard deviation of the optical blur, as a fraction of the image side.
    grain : Range
        Standard deviation of the sensor grain, in [0, 1] intensity units.
    gray : bool
        A one-channel detector: all three channels share the same grain.
    """

    stain: tuple[float, float, float]
    stain_jitter: float
    level: Range
    spread: Range
    auto_exposure: float
    blur: Range
    grain: Range
    gray: bool = False


def acquire(scene: NDArray[np.float32], site: Site, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Record a painted scene at a site.

    Parameters
    ----------
    scene : float32 [H, W, 3] in [0, 1]
        What lies under the lens, free of equipment.
    site : Site
        The laboratory.
    rng : numpy.random.Generator
        Draws the per-image settings; consumed in a fixed order.

    Returns
    -------
    uint8 [H, W, 3]
    """
    image = np.clip(scene, 1e-3, 1.0)
    stain = np.asarray(site.stain) + site.stain_jitter * rng.standard_normal(3)
    image = image ** np.clip(stain, 0.3, 3.0)
    level, spread = rng.uniform(*site.level), rng.uniform(*site.spread)
    image = _expose(image, level=level, spread=spread, share=site.auto_exposure)
    blur = rng.uniform(*site.blur) * scene.shape[0]
    image = gaussian_filter(image, sigma=(blur, blur, 0))
    grain_shape = (*image.shape[:2], 1 if site.gray else 3)
    image = image + rng.uniform(*site.grain) * rng.standard_normal(grain_shape)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _expose(image: NDArray, *, level: float, spread: float, share: float) -> NDArray:
    # One gain and one offset for all channels: auto-exposure changes brightness, never hue.
    mean, deviation = image.mean(), image.std() + 1e-6
    gain = (1 - share) + share * spread / deviation
    offset = (1 - share) * mean + share * level
    return (image - mean) * gain + offset

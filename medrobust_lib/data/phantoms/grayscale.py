"""Brushes shared by the grey-scale phantoms: noise, speckle and edges in unit coordinates.

Every random field is drawn on a lattice whose size does not depend on the number of pixels, so a scene
keeps its anatomy and its texture when it is rendered at another size.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medrobust_lib.data.phantoms.painting import ramp

Field = NDArray[np.float32]

SMALLEST_CANVAS = 96


def canvas_size(size: int) -> int:
    """Side in pixels on which a scene of ``size`` px is drawn: small scenes are supersampled."""
    return max(size, SMALLEST_CANVAS)


def unit_grid(side: int) -> tuple[Field, Field]:
    """Pixel centres in [0, 1]: x float32 [1, side] to the right, y float32 [side, 1] downwards."""
    centres = (np.arange(side, dtype=np.float32) + 0.5) / side
    return centres[None, :], centres[:, None]


def resample(field: Field, shape: tuple[int, int]) -> Field:
    """Bicubic resampling of float32 [h, w] to ``shape`` (rows, columns), anti-aliased when shrinking."""
    return np.asarray(Image.fromarray(field).resize(shape[::-1], Image.Resampling.BICUBIC))


def smooth_noise(rng: np.random.Generator, side: int, cells: tuple[int, int]) -> Field:
    """Smooth Gaussian noise, float32 [side, side], about ``cells`` (rows, columns) humps across."""
    lattice = rng.standard_normal((cells[0] + 1, cells[1] + 1), dtype=np.float32)
    return resample(lattice, (side, side))


def smooth_curve(rng: np.random.Generator, side: int, cells: int) -> Field:
    """Smooth Gaussian noise along x, float32 [1, side]."""
    return resample(rng.standard_normal((1, cells + 1), dtype=np.float32), (1, side))


def speckle(rng: np.random.Generator, side: int, cells: tuple[int, int]) -> Field:
    """Amplitude of a fully developed speckle pattern (Rayleigh, mean near 1), float32 [side, side].

    Interference of many scatterers makes both quadratures Gaussian; ``cells`` is the number of
    speckle grains down and across.
    """
    one, other = smooth_noise(rng, side, cells), smooth_noise(rng, side, cells)
    return np.sqrt(one * one + other * other) * np.float32(0.95)


def step(distance: Field, width: float) -> Field:
    """Smooth step from 0 to 1 as ``distance`` goes from ``-width / 2`` to ``width / 2``."""
    return ramp(distance, -width / 2, width / 2)


def bell(distance: Field, width: float) -> Field:
    """Gaussian bump: 1 at distance 0, standard deviation ``width``."""
    scaled = distance * np.float32(1 / width)
    return np.exp(np.float32(-0.5) * scaled * scaled)


def ridges(noise: Field, width: float) -> Field:
    """Bright lines along the zero crossings of a noise field: septa, ligaments, a reticular mesh."""
    return bell(noise, width)


def ellipse(x: Field, y: Field, *, centre: tuple[float, float], radii: tuple[float, float]) -> Field:
    """Normalised radius of an axis-parallel ellipse: 1 on its outline, 0 in its centre."""
    return np.hypot((x - centre[0]) / radii[0], (y - centre[1]) / radii[1]).astype(np.float32)


def finish(gray: Field, size: int) -> NDArray[np.float32]:
    """Shrink a drawn canvas to ``size`` px and repeat it over three equal channels, clipped to [0, 1]."""
    if gray.shape[0] != size:
        gray = resample(np.ascontiguousarray(gray, dtype=np.float32), (size, size))
    return np.repeat(np.clip(gray, 0, 1).astype(np.float32)[..., None], 3, axis=2)

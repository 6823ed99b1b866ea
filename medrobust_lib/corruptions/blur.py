"""Blurs: motion and zoom with ImageNet-C's geometry, defocus and Gaussian blur as in MedMNIST-C."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from medrobust_lib.corruptions.functions import Pixels, on_pixels

# Weights are whole multiples of 1 / ONE, and 255 * ONE < 2**24: float32 sums of bytes times weights are then exact on
# every machine in every order, and a constant area keeps its grey level.
ONE = 2**16


@on_pixels
def motion_blur(image: Pixels, *, radius: float, sigma: float, rng: np.random.Generator) -> Pixels:
    """Blur along a line at an angle drawn uniformly from -45 to 45 degrees (ImageNet-C).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    radius, sigma : float
        See `line_blur`.
    rng : numpy.random.Generator

    Returns
    -------
    uint8 of the same shape
    """
    return line_blur(image, radius=radius, sigma=sigma, angle=rng.uniform(-45, 45))


@on_pixels
def line_blur(image: Pixels, *, radius: float, sigma: float, angle: float) -> Pixels:
    """Blur along a line as ImageMagick's motion blur does: a one-sided Gaussian over offsets rounded to whole pixels.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
        The border is replicated, so the line may be longer than the image.
    radius : float
        The line has ``2 * ceil(radius) + 1`` pixels.
    sigma : float
        Standard deviation of the weights along the line, in pixels.
    angle : float
        Degrees; 0 looks to the right, 90 down.

    Returns
    -------
    uint8 of the same shape
        Truncated; within one grey level of ImageMagick, and of the package imagecorruptions where the line fits into
        the image. Of a longer line (severity 5 at 28 pixels) that package leaves the rest out, which darkens the image.
    """
    steps = np.arange(2 * math.ceil(radius) + 1)
    turned = math.radians(angle)
    offsets = np.ceil(steps[:, None] * [math.sin(turned), math.cos(turned)] - 0.5).astype(int)  # [taps, (down, right)]
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    return _weighted_shifts(image, offsets, weights / weights.sum(), border="edge")


@on_pixels
def defocus_blur(image: Pixels, *, radius: float, edge_sigma: float) -> Pixels:
    """Average over a disk whose edge is softened by a small Gaussian (ImageNet-C's form, MedMNIST-C's parameters).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
        Mirrored at the border.
    radius : float
        Radius of the disk in pixels.
    edge_sigma : float
        Standard deviation of the 3 x 3 Gaussian (5 x 5 above radius 8) that softens the disk.

    Returns
    -------
    uint8 of the same shape
        Truncated; within one grey level of the public implementation. As there, the disk of radius 8 is softened within
        17 x 17 pixels that it just fills, which adds up to 2 % of brightness.
    """
    reach = max(8, math.ceil(radius))
    squares = np.arange(-reach, reach + 1) ** 2
    disk = (squares[:, None] + squares <= radius**2).astype(np.float64)
    disk /= disk.sum()
    steps = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    edge = np.exp(-(steps**2) / (2 * edge_sigma**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, edge / edge.sum(), axis=axis, mode="mirror")
    return _weighted_shifts(image, np.argwhere(disk > 0) - reach, disk[disk > 0], border="reflect")


@on_pixels
def gaussian_blur(image: Pixels, *, width: int) -> Pixels:
    """Blur with a Gaussian of the standard deviation that torchvision derives from the kernel's width (MedMNIST-C).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
        Mirrored at the border.
    width : int
        Odd width of the kernel in pixels; sigma is ``0.15 * width + 0.35``.

    Returns
    -------
    uint8 of the same shape
        Rounded; within one grey level of the public implementation.
    """
    sigma = 0.15 * width + 0.35
    kernel = np.exp(-((np.arange(width) - width // 2) ** 2) / (2 * sigma**2))
    blurred = image.astype(np.float32)
    for axis in (0, 1):
        blurred = ndimage.correlate1d(blurred, kernel / kernel.sum(), axis=axis, mode="mirror")
    return np.rint(blurred).astype(np.uint8)


@on_pixels
def zoom_blur(image: Pixels, *, factors: Sequence[float]) -> Pixels:
    """Average the image with enlarged copies of itself (ImageNet-C).

    Each copy is the centre of the image, ceil(side / factor) pixels long, enlarged by linear interpolation that keeps
    the corners in place, and trimmed about the centre. Sides of different length are treated each on its own.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    factors : sequence of float
        Enlargements >= 1, not all of them 1.

    Returns
    -------
    uint8 of the same shape
        Truncated; within one grey level of the public implementation.
    """
    height, width = image.shape[:2]
    planes = image.reshape(height, width, -1)
    rows = np.ascontiguousarray(planes.swapaxes(1, 2), dtype=np.float32).reshape(height, -1)  # [H, channels * W]
    enlargements = tuple(factor for factor in factors if factor != 1)
    # Columns come first in the enlarged copies, so that one sparse product enlarges all rows and adds the copies up.
    copies = np.empty((len(enlargements), width, planes.shape[2], height), np.float32)
    for copy, factor in zip(copies, enlargements, strict=True):
        copy[...] = (_enlarging(height, (factor,)) @ rows).reshape(height, -1, width).transpose(2, 1, 0)
    mean = _enlarging(width, enlargements) @ copies.reshape(len(copies) * width, -1)
    mean = mean.reshape(width, -1, height)
    mean += planes.transpose(1, 2, 0) * np.float32(len(factors) + 1 - len(copies))
    mean *= np.float32(1 / (len(factors) + 1))
    mean += np.float32(2**-10)  # a constant area keeps its grey level whatever the last bits of the sum are
    return np.ascontiguousarray(mean.astype(np.uint8).transpose(2, 0, 1)).reshape(image.shape)


@lru_cache(maxsize=512)
def _enlarging(side: int, factors: tuple[float, ...]) -> sparse.csr_array:
    """Operator that enlarges copies of a side, stacked, and adds them up: float32 [side, copies * side]."""
    taps = [_zoom_taps(side, factor) for factor in factors]
    before = np.stack([first + copy * side for copy, (first, _) in enumerate(taps)], axis=1)  # [side, copies]
    share = np.stack([part for _, part in taps], axis=1)
    columns = np.stack([before, before + 1], axis=-1).ravel().astype(np.int32)
    weights = np.stack([1 - share, share], axis=-1).ravel()
    starts = np.arange(side + 1, dtype=np.int32) * 2 * len(factors)
    return sparse.csr_array((weights, columns, starts), shape=(side, len(factors) * side))


def _zoom_taps(side: int, factor: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Pixel before each position of an enlarged side, and the share of the pixel after it; both [side]."""
    crop = math.ceil(side / factor)
    enlarged = round(crop * factor)
    positions = (side - crop) // 2 + (np.arange(side) + (enlarged - side) // 2) * ((crop - 1) / (enlarged - 1))
    before = np.minimum(positions.astype(np.int64), side - 2)
    return before, (positions - before).astype(np.float32)


def _weighted_shifts(image: Pixels, offsets: NDArray[np.int64], weights: NDArray[np.float64], *, border: str) -> Pixels:
    """Replace each pixel by the weighted sum of those at the offsets from it, clipped and truncated.

    `offsets` [taps, 2] are (down, right); `border` is a mode of numpy.pad.
    """
    height, width = image.shape[:2]
    (up, left), (down, right) = np.maximum(-offsets.min(0), 0), np.maximum(offsets.max(0), 0)
    rows = np.pad(np.arange(height), (up, down), mode=border)
    columns = np.pad(np.arange(width), (left, right), mode=border)
    tall = image[rows]
    padded = np.empty((len(rows), len(columns), *image.shape[2:]), np.float32)
    padded[:, left : left + width] = tall
    padded[:, :left] = tall[:, columns[:left]]
    padded[:, left + width :] = tall[:, columns[left + width :]]
    # In the flattened padded image a shift is one number, whatever its direction.
    line, pixel = padded[0].size, padded[0, 0].size
    starts = (offsets[:, 0] + up) * line + (offsets[:, 1] + left) * pixel
    total = np.zeros((height, *padded.shape[1:]), np.float32)
    length = (height - 1) * line + width * pixel
    flat, sums = padded.ravel(), total.reshape(-1)[:length]
    share = np.empty_like(sums)
    for start, weight in zip(starts.tolist(), _exact_weights(weights), strict=True):
        if weight:
            np.multiply(flat[start : start + length], weight, out=share)
            sums += share
    return np.minimum(total[:, :width], 255).astype(np.uint8)


def _exact_weights(weights: NDArray[np.float64]) -> NDArray[np.float32]:
    """Multiples of 1 / ONE next to the weights, their sum rounded once (the largest remainders go up)."""
    exact = weights * ONE
    whole = np.floor(exact).astype(np.int64)
    largest = np.argsort(whole - exact, kind="stable")[: round(exact.sum()) - whole.sum()]
    whole[largest] += 1
    return (whole / ONE).astype(np.float32)

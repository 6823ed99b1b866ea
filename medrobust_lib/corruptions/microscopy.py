"""Drawn objects of blood smears: stain deposits and bubbles (MedMNIST-C).

Number, size, place, colour and opacity follow the official generator. Its random numbers come from another source, so
no single image can be equal. Bubbles have the same law at its 224 x 224 pixels. The official stain deposits are ten
drawn masks of each size that ship with its package; ours are drawn anew, of the same size and colour, and fill less of
their square (.53 of it; the official masks fill .63 at 24 pixels and .54 at 32). So stain deposits are alike, not equal
in law: accuracies under them are not comparable digit by digit.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from medrobust_lib.corruptions.pixels import Pixels, as_rgb, back_to_gray, on_pixels

MARGIN = 10  # pixels that stain deposits keep from the border
RING = 2  # pixels


@on_pixels
def stain_deposit(image: Pixels, *, most: int, side: int, rng: np.random.Generator) -> Pixels:
    """Cover parts of the image with black blots of dried stain.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    most : int
        The number of blots is uniform on 1 to `most`.
    side : int
        Height and width of a blot in pixels; smaller where the image is.
    rng : numpy.random.Generator

    Returns
    -------
    uint8 of the same shape
    """
    stained = image.copy()
    side = min(side, *image.shape[:2])
    for _ in range(rng.integers(1, most, endpoint=True)):
        blot = _blot(side, rng)
        top, left = (_corner(length, side, rng) for length in image.shape[:2])
        stained[top : top + side, left : left + side][blot] = 0
    return stained


def _corner(length: int, side: int, rng: np.random.Generator) -> int:
    """Uniform place for an object along one side of the image, off the border by the margin where there is room."""
    margin = min(MARGIN, (length - side) // 2)
    return int(rng.integers(margin, length - side - margin, endpoint=True))


def _blot(side: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw a round shape with an uneven outline that fills a bit more than half of its square."""
    waves = np.arange(2, 10)
    heights = rng.normal(scale=0.25 / waves)
    phases = rng.uniform(0, 2 * np.pi, len(waves))
    down, right = np.mgrid[:side, :side] - (side - 1) / 2
    angles = np.arctan2(down, right)
    outline = 1 + (heights * np.cos(waves * angles[..., None] + phases)).sum(-1)
    return np.hypot(down, right) <= outline / outline.max() * side / 2


@on_pixels
def bubble(image: Pixels, *, largest_radius: int, most: int, rng: np.random.Generator) -> Pixels:
    """Lay translucent white disks with a brighter ring over the image.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    largest_radius : int
        Radii are uniform on 3 to this number of pixels.
    most : int
        The number of bubbles is uniform on 7 to `most`.
    rng : numpy.random.Generator

    Returns
    -------
    uint8 of the same shape
    """
    picture = Image.fromarray(as_rgb(image))
    layer = Image.new("RGBA", picture.size, (255, 255, 255, 0))
    draw = ImageDraw.Draw(layer)
    for _ in range(rng.integers(7, most, endpoint=True)):
        radius = int(rng.integers(3, largest_radius, endpoint=True))
        x, y = (_centre(length, radius, rng) for length in picture.size)
        for reach, opacity in ((radius + RING, 130), (radius, 100)):
            draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=(255, 255, 255, opacity))
    picture.paste(layer, (0, 0), layer)
    return back_to_gray(np.array(picture), image)


def _centre(length: int, radius: int, rng: np.random.Generator) -> int:
    """Uniform centre that keeps a disk inside the image; the middle where the disk is larger than the image."""
    first = min(radius, length // 2)
    return int(rng.integers(first, max(length - radius, first), endpoint=True))

"""Corruptions that storage and display bring about."""

import io

import numpy as np
from PIL import Image

from medrobust_lib.corruptions.pixels import Pixels, on_pixels


@on_pixels
def pixelate(image: Pixels, *, factor: float) -> Pixels:
    """Shrink with a box filter and enlarge with a box filter, both by PIL (ImageNet-C).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    factor : float
        Side of the small image relative to the side of the image, in (0, 1].

    Returns
    -------
    uint8 of the same shape
    """
    picture = Image.fromarray(image)
    small = (int(picture.width * factor), int(picture.height * factor))
    return np.array(picture.resize(small, Image.Resampling.BOX).resize(picture.size, Image.Resampling.BOX))


@on_pixels
def jpeg_compression(image: Pixels, *, quality: int) -> Pixels:
    """Write and read the image as a JPEG by PIL, with its default chroma subsampling (ImageNet-C).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    quality : int
        PIL's JPEG quality, 1 (worst) to 95.

    Returns
    -------
    uint8 of the same shape
    """
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))

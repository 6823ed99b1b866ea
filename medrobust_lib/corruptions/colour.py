"""Corruptions of brightness, contrast and colour.

ImageNet-C adds to the brightness and shrinks contrast about each channel's mean; MedMNIST-C multiplies both, as PIL's
enhancers do. The two families keep separate functions, because their parameters do not translate into each other.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from medrobust_lib.corruptions.pixels import Pixels, as_rgb, back_to_gray, on_pixels

# Whole numbers must survive a truncation whatever the last bit of a product is; far less than a grey level.
NUDGE = np.float32(2**-12)


@on_pixels
def brightness(image: Pixels, *, added: float) -> Pixels:
    """Add to the value of HSV, clip, truncate (ImageNet-C).

    Hue and saturation stay, so each pixel is multiplied by min(V + added, 1) / V, with V its largest channel.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    added : float
        In [0, 1] pixel units.

    Returns
    -------
    uint8 of the same shape
        Within one grey level of the public implementation, which goes through HSV in floating point.
    """
    gains, black = _brightness_gains(added)
    if image.ndim == 2:
        levels = np.arange(256) * gains + NUDGE
        levels[0] = black
        return levels.astype(np.uint8)[image]
    value = np.maximum(np.maximum(image[..., 0], image[..., 1]), image[..., 2])
    brighter = np.repeat(gains[value.ravel()], 3).reshape(image.shape)
    brighter *= image
    brighter += NUDGE
    result = brighter.astype(np.uint8)
    if not value.all():
        result[value == 0] = black
    return result


@lru_cache(maxsize=64)
def _brightness_gains(added: float) -> tuple[NDArray[np.float32], int]:
    """Factor for each largest channel 0 to 255 (float32 [256]), and the level that black turns into."""
    value = np.arange(256) / 255
    gains = np.minimum(value + added, 1) / np.maximum(value, 1 / 255)
    gains = gains.astype(np.float32)
    gains.flags.writeable = False
    return gains, int(min(added, 1) * 255 + NUDGE)


@on_pixels
def contrast(image: Pixels, *, factor: float) -> Pixels:
    """Shrink the distance to each channel's mean, clip, truncate (ImageNet-C).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    factor : float
        Share of the contrast that stays.

    Returns
    -------
    uint8 of the same shape
        Bit for bit what the public implementation gives.
    """
    height, width = image.shape[:2]
    columns = image.reshape(height, -1).sum(0, dtype=np.uint32).reshape(width, -1)
    levels = _contrast_levels(columns.sum(0) / (255.0 * height * width), factor)
    # The public implementation sums floats. Where their last bits decide how a level is cut, sum as it does.
    rounding = 255 * (height * width * np.finfo(float).eps + 1e-12)
    if (np.abs(levels - levels.round()) < rounding).any():
        levels = _contrast_levels(np.mean(as_rgb(image) / 255.0, axis=(0, 1))[: levels.shape[1]], factor)
    return np.array(Image.fromarray(image).point(levels.astype(np.uint8).T.ravel().tolist()))


def _contrast_levels(means: NDArray[np.float64], factor: float) -> NDArray[np.float64]:
    """Float levels [256, channels] that the 256 grey levels turn into, before they are cut."""
    means = means[None]
    return np.clip((np.arange(256)[:, None] / 255.0 - means) * factor + means, 0, 1) * 255


@on_pixels
def scale_brightness(image: Pixels, *, factor: float) -> Pixels:
    """Multiply the image by a factor, as PIL's brightness enhancer does (MedMNIST-C).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    factor : float
        Above 1 brighter, below 1 darker.

    Returns
    -------
    uint8 of the same shape
    """
    return np.array(ImageEnhance.Brightness(Image.fromarray(image)).enhance(factor))


@on_pixels
def scale_contrast(image: Pixels, *, factor: float) -> Pixels:
    """Multiply the distance to the mean luma by a factor, as PIL's contrast enhancer does (MedMNIST-C).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    factor : float
        Above 1 more contrast, below 1 less.

    Returns
    -------
    uint8 of the same shape
    """
    return np.array(ImageEnhance.Contrast(Image.fromarray(image)).enhance(factor))


@on_pixels
def gamma_correction(image: Pixels, *, exponent: float) -> Pixels:
    """Raise the values in [0, 1] to a power, with torchvision's rounding (MedMNIST-C).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    exponent : float
        Above 1 darker, below 1 brighter.

    Returns
    -------
    uint8 of the same shape
    """
    levels = (256 - 1e-3) * (np.arange(256) / 255.0) ** exponent
    return levels.astype(np.uint8)[image]


@on_pixels
def saturate(image: Pixels, *, added: float) -> Pixels:
    """Add to the saturation of HSV, clip, truncate (MedMNIST-C).

    A gray pixel has no hue; like the public implementation, this gives it hue 0, so that it turns reddish.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    added : float
        In [0, 1].

    Returns
    -------
    uint8 of the same shape
        Within one grey level of the public implementation. Of a gray image, the luma.
    """
    rgb = as_rgb(image).astype(np.float64)
    value = rgb.max(-1, keepdims=True)
    spread = value - rgb.min(-1, keepdims=True)
    saturation = np.divide(spread, value, out=np.zeros_like(value), where=value > 0)
    depth = np.broadcast_to([0.0, 1.0, 1.0], rgb.shape).copy()  # hue 0, for pixels without spread
    np.divide(value - rgb, spread, out=depth, where=spread > 0)
    coloured = value * (1 - np.minimum(saturation + added, 1) * depth)
    return back_to_gray((coloured + NUDGE).astype(np.uint8), image)

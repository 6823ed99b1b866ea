"""Corruptions but for blurs, as pure functions of one image: noise, colour, digital and microscopy; and a spectrum.

All ask the same of their images (`check_images`). A gray image takes the way of an RGB one and comes back as its luma.
"""

import functools
import io
from collections.abc import Callable
from functools import lru_cache
from typing import Concatenate, ParamSpec

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance
from scipy.fft import dctn

Pixels = NDArray[np.uint8]
P = ParamSpec("P")

_SMALLEST_SIDE = 28


def on_pixels(function: Callable[Concatenate[Pixels, P], Pixels]) -> Callable[Concatenate[Pixels, P], Pixels]:
    """Refuse what is no single uint8 image, and hand on the rest in one contiguous block."""

    @functools.wraps(function)
    def checked(image: Pixels, /, *args: P.args, **kwargs: P.kwargs) -> Pixels:
        if check_images(image):
            raise ValueError(f"an array of shape {image.shape} holds several images; `corrupt` takes batches")
        return function(np.ascontiguousarray(image), *args, **kwargs)

    return checked


def check_images(images: object) -> bool:
    """Whether uint8 images [n, H, W, 3], [n, H, W], [H, W, 3] or [H, W], at least 28 x 28 pixels, are a batch.

    Raises
    ------
    TypeError
        Not an array, or not of 8-bit pixels; the message says how to convert.
    ValueError
        Wrong shape, alpha channel, no image at all, or images smaller than 28 pixels.
    """
    if not isinstance(images, np.ndarray):
        raise TypeError(
            f"images are a {type(images).__name__}; give a uint8 array, such as np.asarray(picture) or data.images"
        )
    if images.dtype != np.uint8:
        raise TypeError(f"images hold {images.dtype} values, but corruptions take uint8; {_conversion(images)}")
    if images.size == 0:
        raise ValueError(f"there is no image in an array of shape {images.shape}; give at least one")
    if images.ndim not in (2, 3, 4):
        raise ValueError(f"images of shape {images.shape}: give [n, H, W, 3], [n, H, W], [H, W, 3] or [H, W]")
    channels_last = images.ndim == 4 or (images.ndim == 3 and images.shape[2] < _SMALLEST_SIDE)
    if channels_last and images.shape[-1] != 3:
        raise ValueError(f"images of shape {images.shape} are neither RGB nor gray; {_channel_advice(images)}")
    height, width = images.shape[-3:-1] if channels_last else images.shape[-2:]
    if min(height, width) < _SMALLEST_SIDE:
        raise ValueError(
            f"images of {height} x {width} pixels: each side needs at least {_SMALLEST_SIDE}; resize first"
        )
    return images.ndim - channels_last == 3


def _conversion(images: np.ndarray) -> str:
    if images.dtype == np.uint16:
        return "convert 16-bit pixels, after any windowing: (image / 65535 * 255).round().astype(np.uint8)"
    if images.dtype == np.bool_:
        return "convert: image.astype(np.uint8) * 255"
    if np.issubdtype(images.dtype, np.floating):
        return "convert values in [0, 1]: (image * 255).round().astype(np.uint8)"
    return "convert values in 0 to 255: image.clip(0, 255).astype(np.uint8)"


def _channel_advice(images: np.ndarray) -> str:
    if images.shape[-1] == 4:
        return "drop the alpha channel: images[..., :3]"
    if images.shape[-1] == 1:
        return "drop the last axis: images[..., 0]"
    if images.ndim == 4 and images.shape[1] == 3:
        return "move the channels last: images.transpose(0, 2, 3, 1)"
    return "the last axis must hold 3 channels"


def as_rgb(image: Pixels) -> Pixels:
    """RGB copies of a gray image [H, W]; an RGB image stays as it is."""
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def on_rgb(function: Callable[Concatenate[Pixels, P], Pixels]) -> Callable[Concatenate[Pixels, P], Pixels]:
    """As `on_pixels`, for a function of RGB images: a gray one comes back as the result's luma, rounded as PIL does."""

    @functools.wraps(function)
    def coloured(image: Pixels, /, *args: P.args, **kwargs: P.kwargs) -> Pixels:
        result = function(as_rgb(image), *args, **kwargs)
        return result if image.ndim == 3 else np.array(Image.fromarray(result).convert("L"))

    return on_pixels(coloured)


@on_rgb
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
    noisy = rng.standard_normal(image.shape, dtype=np.float32)
    noisy *= 255 * sigma
    noisy += image
    return _truncated(noisy)


@on_rgb
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
    chance = rng.random(image.shape, dtype=np.float32)
    noisy = image * (chance >= amount / 2)
    noisy |= -(chance >= 1 - amount / 2).view(np.uint8)  # minus one is 255 in uint8
    return noisy


@on_rgb
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
    noisy = rng.standard_normal(image.shape, dtype=np.float32)
    noisy *= sigma
    noisy += 1
    noisy *= image
    return _truncated(noisy)


@on_rgb
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
    counts = rng.poisson(image * (photons / 255))
    return _truncated(counts * (255 / photons))


def _truncated(values: np.ndarray) -> Pixels:
    """Clip to a byte and cut the fraction off, as the public implementations do."""
    np.clip(values, 0, 255, out=values)
    return values.astype(np.uint8)


# Whole numbers must survive a truncation whatever the last bit of a product is; far less than a grey level.
_NUDGE = np.float32(2**-12)


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
        levels = np.arange(256) * gains + _NUDGE
        levels[0] = black
        return levels.astype(np.uint8)[image]
    value = np.maximum(np.maximum(image[..., 0], image[..., 1]), image[..., 2])
    brighter = np.repeat(gains[value.ravel()], 3).reshape(image.shape)
    brighter *= image
    brighter += _NUDGE
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
    return gains, int(min(added, 1) * 255 + _NUDGE)


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


@on_rgb
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
    rgb = image.astype(np.float64)
    value = rgb.max(-1, keepdims=True)
    spread = value - rgb.min(-1, keepdims=True)
    saturation = np.divide(spread, value, out=np.zeros_like(value), where=value > 0)
    depth = np.broadcast_to([0.0, 1.0, 1.0], rgb.shape).copy()  # hue 0, for pixels without spread
    np.divide(value - rgb, spread, out=depth, where=spread > 0)
    coloured = value * (1 - np.minimum(saturation + added, 1) * depth)
    return (coloured + _NUDGE).astype(np.uint8)


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


_MARGIN = 10  # pixels that stain deposits keep from the border
_RING = 2  # pixels


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
        corner = []
        for room in (length - side for length in image.shape[:2]):
            margin = min(_MARGIN, room // 2)
            corner.append(rng.integers(margin, room - margin, endpoint=True))
        top, left = corner
        stained[top : top + side, left : left + side][blot] = 0
    return stained


def _blot(side: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw a round shape with an uneven outline that fills a bit more than half of its square."""
    waves = np.arange(2, 10)
    heights = rng.normal(scale=0.25 / waves)
    phases = rng.uniform(0, 2 * np.pi, len(waves))
    down, right = np.mgrid[:side, :side] - (side - 1) / 2
    angles = np.arctan2(down, right)
    outline = 1 + (heights * np.cos(waves * angles[..., None] + phases)).sum(-1)
    return np.hypot(down, right) <= outline / outline.max() * side / 2


@on_rgb
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
    picture = Image.fromarray(image)
    layer = Image.new("RGBA", picture.size, (255, 255, 255, 0))
    draw = ImageDraw.Draw(layer)
    for _ in range(rng.integers(7, most, endpoint=True)):
        radius = int(rng.integers(3, largest_radius, endpoint=True))
        # Inside the image; in its middle where the disk is larger.
        ranges = [(min(radius, length // 2), length - radius) for length in picture.size]
        x, y = (int(rng.integers(first, max(last, first), endpoint=True)) for first, last in ranges)
        for reach, opacity in ((radius + _RING, 130), (radius, 100)):
            draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=(255, 255, 255, opacity))
    picture.paste(layer, (0, 0), layer)
    return np.array(picture)


def dct_power(images: NDArray) -> NDArray[np.float64]:
    """Mean squared DCT coefficient per frequency.

    Parameters
    ----------
    images : float [n, H, W]
        Gray images in [0, 1] units; the transform is orthonormal, so white noise has power sigma^2 at every frequency.

    Returns
    -------
    float64 [H, W]
        Row and column are the vertical and horizontal frequency in half cycles per image.
    """
    return np.mean(dctn(np.asarray(images, np.float64), axes=(1, 2), norm="ortho") ** 2, axis=0)


def radial_profile(power: NDArray, *, n_bins: int = 24) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Average a DCT power map over rings of equal frequency.

    Parameters
    ----------
    power : float [H, W]
        As `dct_power` returns it.
    n_bins : int
        Number of rings; rings without a coefficient are left out.

    Returns
    -------
    frequency, mean_power : float64 [m]
        The frequency is the ring's centre as a fraction of the Nyquist frequency, 0 to sqrt(2) (the corner).
    """
    rows, columns = (np.arange(side) / side for side in power.shape)
    radius = np.hypot(rows[:, None], columns[None, :])
    edges = np.linspace(0, np.sqrt(2), n_bins + 1)
    ring = np.clip(np.digitize(radius.ravel(), edges) - 1, 0, n_bins - 1)
    count = np.bincount(ring, minlength=n_bins)
    total = np.bincount(ring, power.ravel(), n_bins)
    filled = count > 0
    return ((edges[:-1] + edges[1:]) / 2)[filled], total[filled] / count[filled]

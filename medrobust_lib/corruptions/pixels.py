"""What every corruption asks of its images, and how a gray image takes the way of an RGB one."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
P = ParamSpec("P")

SMALLEST_SIDE = 28


def on_pixels(function: Callable[Concatenate[Pixels, P], Pixels]) -> Callable[Concatenate[Pixels, P], Pixels]:
    """Refuse what is no single uint8 image, and hand on the rest in one contiguous block."""

    @functools.wraps(function)
    def checked(image: Pixels, /, *args: P.args, **kwargs: P.kwargs) -> Pixels:
        if check_images(image):
            raise ValueError(f"an array of shape {image.shape} holds several images; `corrupt` takes batches")
        return function(np.ascontiguousarray(image), *args, **kwargs)

    return checked


def check_images(images: object) -> bool:
    """Refuse anything but uint8 images, gray or RGB, of at least 28 x 28 pixels.

    Parameters
    ----------
    images : uint8 [n, H, W, 3], [n, H, W], [H, W, 3] or [H, W]

    Returns
    -------
    bool
        Whether the array is a batch.

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
    channels_last = images.ndim == 4 or (images.ndim == 3 and images.shape[2] < SMALLEST_SIDE)
    if channels_last and images.shape[-1] != 3:
        raise ValueError(f"images of shape {images.shape} are neither RGB nor gray; {_channel_advice(images)}")
    height, width = images.shape[-3:-1] if channels_last else images.shape[-2:]
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(
            f"images of {height} x {width} pixels: corruptions need at least {SMALLEST_SIDE} on each side; resize first"
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


def back_to_gray(rgb: Pixels, like: Pixels) -> Pixels:
    """Luma of a corrupted RGB image, rounded as PIL does, where the image came in gray."""
    return rgb if like.ndim == 3 else np.array(Image.fromarray(rgb).convert("L"))


def as_luma(image: Pixels) -> Pixels:
    """Luma in three equal channels of an RGB image; a gray image [H, W] stays as it is."""
    return image if image.ndim == 2 else as_rgb(np.array(Image.fromarray(image).convert("L")))

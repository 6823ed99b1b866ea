"""Image geometry in front of a model: resize, crop or pad to a square, on 8-bit Pillow images; random crops of it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from medrobust_lib.checks import check_choice, check_whole
from medrobust_lib.data.decoding import read_image

Geometry = Literal["shortest-edge-crop", "pad-square", "letterbox", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
ImageInput = np.ndarray | Sequence[Image.Image | np.ndarray | str | Path]

PIXEL_LIMIT = 32.0  # largest magnitude taken for a noisy pixel; values in 0 to 255 were never scaled

_LARGEST_ASPECT = 4 / 3  # of a random crop
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the image tower.

    Attributes
    ----------
    image_size : int
        S, side of the square that the model reads, in pixels.
    geometry : {"shortest-edge-crop", "pad-square", "letterbox", "squash"}
        ``shortest-edge-crop`` (CLIP): the shorter edge is resized to S and the longer one to
        ``int(S * long / short)``, then the central S x S is cut out.
        ``pad-square`` (MedCLIP): the image is centred on a black square of side ``max(S, H, W)``, which is resized
        to S; an image smaller than S is thus framed, not enlarged.
        ``letterbox`` (generative models): the same with a square of side ``max(H, W)``, so that nothing is cut off.
        ``squash`` (SigLIP): both edges are resized to S whatever the aspect.
    interpolation : {"bicubic", "bilinear"}
        Pillow's filter, which is antialiased when it shrinks.
    mean, std : tuple of 3 floats
        Per-channel normalisation of [0, 1] pixels, applied inside ``DualEncoder.encode_image``.
    grayscale : bool
        Convert to luma (ITU-R 601) first and repeat it on three channels.
    floor_margin : bool
        A centre crop halves an odd margin downwards, as transformers does; else to the even number, as torchvision
        and open_clip do.
    """

    image_size: int
    geometry: Geometry
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    grayscale: bool = False
    floor_margin: bool = False

    def __post_init__(self) -> None:
        check_whole("image_size", self.image_size)
        check_choice("geometry", self.geometry, get_args(Geometry))
        check_choice("interpolation", self.interpolation, get_args(Interpolation))
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std need 3 values each, std above 0: {self.mean}, {self.std}")


def prepare_images(images: ImageInput, preprocessing: Preprocessing) -> Tensor:
    """Bring images to a model's square, in [0, 1] and not normalised.

    Parameters
    ----------
    images : array or sequence
        uint8 [n, H, W, 3] or [n, H, W], or a sequence of PIL images, uint8 arrays and paths.
    preprocessing : Preprocessing
        Size, geometry, interpolation and colour.

    Returns
    -------
    Tensor
        float32 [n, 3, S, S] in [0, 1].

    Raises
    ------
    TypeError
        If the input is no array or sequence of images, or an array is not uint8.
    ValueError
        For NaN, a wrong shape, an unsupported bit depth or a corrupt file (named).
    FileNotFoundError
        If a path leads nowhere.

    Notes
    -----
    The resize is Pillow's on 8-bit values. The result equals open_clip's inference transform exactly, and that of
    transformers' image processors that use Pillow; those that use torchvision round some values to the next of the
    256 levels.
    """
    squares = [_square(image, preprocessing) for image in _pillow_images(images)]
    if not squares:
        raise ValueError("no image given: prepare() needs at least one")
    stacked = torch.from_numpy(np.stack([np.asarray(square) for square in squares]))
    return stacked.permute(0, 3, 1, 2).contiguous().to(torch.float32).div(255)


def _pillow_images(images: ImageInput) -> Iterable[Image.Image]:
    """Each input as an 8-bit Pillow image, checked."""
    if isinstance(images, (str, Path, Image.Image)):
        raise TypeError(f"images must be a sequence: pass [{type(images).__name__}(...)] for a single one")
    if isinstance(images, Tensor):
        raise TypeError("images must be uint8 arrays [n, H, W, 3], PIL images or paths, not a torch.Tensor")
    if isinstance(images, np.ndarray):
        if images.dtype != object:
            _check_array(images, "images")
            if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] != 3):
                raise ValueError(f"images must be uint8 [n, H, W, 3] or [n, H, W], not {images.shape}")
            if images.ndim == 3 and images.shape[-1] == 3 and min(images.shape[:2]) > 3:
                raise ValueError(f"images of shape {images.shape} look like a single one: pass images[None]")
    elif not isinstance(images, Iterable):
        raise TypeError(f"images must be an array or a sequence of images or paths, not {type(images).__name__}")
    return (_pillow_image(image, index) for index, image in enumerate(images))


def _pillow_image(image: Image.Image | np.ndarray | str | Path, index: int) -> Image.Image:
    """One input as an 8-bit Pillow image; ``index`` is named in errors."""
    if isinstance(image, (str, Path)):
        return Image.fromarray(read_image(image))
    if isinstance(image, np.ndarray):
        _check_array(image, f"image {index}")
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] != 3) or 0 in image.shape:
            raise ValueError(f"image {index} must be uint8 [H, W, 3] or [H, W], not {image.shape}")
        return Image.fromarray(np.ascontiguousarray(image))
    if isinstance(image, Image.Image):
        if image.mode not in _EIGHT_BIT_MODES:  # Pillow would clip it silently
            raise ValueError(f"image {index}: Pillow mode {image.mode!r} is not 8-bit; window it to uint8 0..255 first")
        return image
    raise TypeError(f"image {index} must be a PIL image, a uint8 array or a path, not {type(image).__name__}")


def _check_array(array: np.ndarray, name: str) -> None:
    """Refuse everything but uint8, saying what was found."""
    if array.dtype == np.uint8:
        return
    if array.size and np.issubdtype(array.dtype, np.number):
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: NaN or infinite values in a {array.dtype} array; expected uint8 in 0..255")
        found = f"{array.dtype} with values in [{array.min():.4g}, {array.max():.4g}]"
    else:
        found = str(array.dtype)
    raise TypeError(f"{name}: expected uint8 in 0..255, found {found}; scale to 0..255, round and cast to uint8")


def _square(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """RGB image of S x S pixels after the model's geometry."""
    size, resampling = preprocessing.image_size, Image.Resampling[preprocessing.interpolation.upper()]
    image = image.convert("L" if preprocessing.grayscale else "RGB")
    width, height = image.size
    if preprocessing.geometry in ("pad-square", "letterbox"):
        side = max(width, height, size if preprocessing.geometry == "pad-square" else 0)
        canvas = Image.new(image.mode, (side, side))
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        image = canvas
    if preprocessing.geometry == "shortest-edge-crop":
        short, long = min(width, height), max(width, height)
        resized_long = int(size * long / short)
        target = (size, resized_long) if width <= height else (resized_long, size)
    else:
        target = (size, size)
    if image.size != target:
        image = image.resize(target, resampling)
    if target != (size, size):
        halved = math.floor if preprocessing.floor_margin else round
        left, top = (halved((edge - size) / 2) for edge in target)
        image = image.crop((left, top, left + size, top + size))
    return image.convert("RGB")


def per_channel(values: float | Sequence[float]) -> tuple[float, ...]:
    """Mean or standard deviation of each channel; one number stands for all three."""
    return (values,) * 3 if isinstance(values, int | float) else tuple(values)


def check_pixels(pixels: Tensor, *, image_size: int, model: str) -> None:
    """Refuse what a model cannot take for prepared images plus noise.

    Raises
    ------
    TypeError
        No floating point tensor.
    ValueError
        No image, another shape than [n, 3, image_size, image_size], NaN or infinite values, or values so far from
        [0, 1] that they were never scaled.
    """
    if not isinstance(pixels, Tensor):
        raise TypeError(f"pixels must be a torch.Tensor from prepare(), not {type(pixels).__name__}")
    if not pixels.is_floating_point():
        raise TypeError(f"pixels must be floating point in [0, 1], not {pixels.dtype}; use prepare() first")
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, image_size, image_size):
        raise ValueError(
            f"pixels must be [n, 3, {image_size}, {image_size}] for {model}, not {tuple(pixels.shape)}; "
            "use prepare() first"
        )
    if len(pixels) == 0:
        raise ValueError("pixels hold no image")
    low, high = torch.stack(torch.aminmax(pixels.detach())).tolist()  # one transfer from an accelerator
    if not (np.isfinite(low) and np.isfinite(high)):
        broken = (~torch.isfinite(pixels.detach())).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(
            f"pixels hold NaN or infinite values in image {broken[0]} ({len(broken)} in all): the "
            "image, what was added to it, or the denoiser in front of the model made them"
        )
    if max(-low, high) > PIXEL_LIMIT:
        raise ValueError(f"pixels range over [{low:.4g}, {high:.4g}]: expected [0, 1] plus noise; divide 0..255 by 255")


@dataclass(frozen=True)
class CropAndFlip:
    """How a training image is cut out and mirrored at random, anew every time it is used.

    Attributes
    ----------
    crop : float in (0, 1]
        Least share of the area that a random crop keeps; it is resized back. Its aspect is 3:4 to 4:3. 1 crops nothing.
        RobustMedCLIP keeps 0.8, the default; CoOp 0.08.
    flip : bool
        Mirror half of the images left to right.

    Raises
    ------
    ValueError
        A share out of range.
    """

    crop: float = 0.8
    flip: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.crop, bool) or not isinstance(self.crop, int | float) or not 0 < self.crop <= 1:
            raise ValueError(f"crop={self.crop!r}: give the least share of the area that is kept, above 0 and up to 1")
        if not isinstance(self.flip, bool):
            raise ValueError(f"flip={self.flip!r}: give True or False")


def crop_and_flip(pixels: Tensor, augmentation: CropAndFlip, *, generator: torch.Generator) -> Tensor:
    """Cut out a random rectangle of each image, resize it back, and mirror half of them.

    Parameters
    ----------
    pixels : float [n, 3, H, W]
    augmentation : CropAndFlip
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

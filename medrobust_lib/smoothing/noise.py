"""The one place where noise meets a model: addressed noise, noisy copies, as many at a time as memory allows.

Noise is what a perturbation draws (`medrobust_lib.smoothing.perturbations`): values for every pixel, or the parameters
of a corruption; a noisy copy is the image that they make. Every
draw is addressed by (seed, data set, image index, sigma, role, perturbation, draw number). Results therefore do not
depend on batch size, order, number of workers or on where an interrupted run resumed. The numbers themselves come from
torch's generator of the device, so a CPU and a GPU draw different noise. On a CPU that generator takes 32 bits of an
address: draws come from 4e9 fixed noise images, whose share of a class differs from its probability by about 1e-5 times
the standard deviation of a vote, far less than any number of draws tells.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
import psutil
import torch
from torch import Tensor

from medrobust_lib.checks import check_choice
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.geometry import CropAndFlip, crop_and_flip
from medrobust_lib.smoothing.perturbations import PIXEL_NOISE, Perturbation, Sigma

Result = TypeVar("Result")
Role = Literal["adapt", "select", "estimate"]

_LARGEST = {"cpu": 64}  # larger batches fall out of a processor's cache and are slower, not faster
_LARGEST_ON_ACCELERATORS = 1024
_WORKING_SET = 64  # activations of the tested towers, in float32 copies of the input, with a margin
_SHARE_OF_FREE_MEMORY = 0.5
# What torch says where it raises no error of its own kind: the CPU of Linux and of Windows, MPS, cuBLAS and cuDNN.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NoiseStream:
    """An endless, addressable sequence of noise for one image: Gaussian noise images, or a corruption's parameters.

    Attributes
    ----------
    seed : int
    dataset : str
        Id of the data set.
    index : int
        Position of the image in its full split.
    sigma : float or tuple of float
        Standard deviation, >= 0, in the units of the perturbation: for pixel noise [0, 1] pixel units. A pair for two
        parameters.
    role : {"adapt", "select", "estimate"}
        What the noise is for. Prompts may only ever see "adapt"; a certificate's class comes from
        "select" and its bound from "estimate".
    perturbation : Perturbation

    Raises
    ------
    ValueError
        Negative sigma or unknown role.
    """

    seed: int
    dataset: str
    index: int
    sigma: Sigma
    role: Role
    perturbation: Perturbation = PIXEL_NOISE

    def __post_init__(self) -> None:
        levels = self.sigma if isinstance(self.sigma, tuple) else (self.sigma,)
        if not all(0 <= level < float("inf") for level in levels):
            raise ValueError(
                f"sigma={self.sigma}: noise levels are standard deviations >= 0 in {self.perturbation.units}"
            )
        check_choice("noise role", self.role, get_args(Role))

    def draw(
        self, shape: tuple[int, ...], *, first: int = 0, count: int = 1, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw noise number `first` to ``first + count - 1``.

        Parameters
        ----------
        shape : tuple of int
            Shape of one image, for example ``(3, 64, 64)``.
        first, count : int
        device : torch.device
            Where the noise is drawn and stays.

        Returns
        -------
        float32, count of that shape for pixel noise, [count, m] for m parameters
            N(0, sigma^2), or exponential of mean sigma; independent over draws, pixels and parameters.
        """
        noise = torch.empty(count, *self.perturbation.shape(shape), device=device)
        generator = torch.Generator(noise.device)
        for row, seed in zip(noise, self._draw_seeds(first, count), strict=True):
            self.perturbation.draw_into(row, self.sigma, generator.manual_seed(seed))
        return noise

    def decoding_seeds(self, first: int, count: int) -> list[int]:
        """Seeds for a randomised classifier, one a draw; independent of the noise of the same draw."""
        return list(self._draw_seeds(first, count, purpose=', "decoding"'))

    def cropped(self, pixels: Tensor, augmentation: CropAndFlip, *, number: int) -> Tensor:
        """Cut out and mirror an image [3, H, W] at random for one draw; independent of the noise of that draw."""
        (seed,) = self._draw_seeds(number, 1, purpose=', "crop"')
        generator = torch.Generator(pixels.device).manual_seed(seed)
        return crop_and_flip(pixels[None], augmentation, generator=generator)[0]

    def _draw_seeds(self, first: int, count: int, *, purpose: str = "") -> Iterator[int]:
        """Hash the address of each draw; hashing the common beginning once takes most of the cost away."""
        # 1 and 1.0, or numpy's numbers, are the same address.
        sigma = [float(level) for level in self.sigma] if isinstance(self.sigma, tuple) else float(self.sigma)
        other = [] if self.perturbation == PIXEL_NOISE else [self.perturbation.name]
        address = json.dumps([int(self.seed), self.dataset, int(self.index), sigma, self.role, *other])
        common = hashlib.blake2b(address.removesuffix("]").encode(), digest_size=8)
        for number in range(first, first + count):
            whole = common.copy()
            whole.update(f", {number}{purpose}]".encode())
            yield int.from_bytes(whole.digest(), "big", signed=True)


def noisy_copies(pixels: Tensor, stream: NoiseStream, *, first: int = 0, count: int = 1) -> Tensor:
    """Perturb copies of one image by a stream's noise; nothing is clipped, as in Cohen et al. (2019).

    Parameters
    ----------
    pixels : float32 [3, H, W]
        In [0, 1], before the model's normalisation.
    stream : NoiseStream
    first, count : int
        Which draws.

    Returns
    -------
    float32 [count, 3, H, W]
        On the device of the pixels, where the noise is drawn too.
    """
    noise = stream.draw(tuple(pixels.shape), first=first, count=count, device=pixels.device)
    return stream.perturbation.apply(pixels.to(noise.dtype), noise)


@dataclass
class Batches:
    """A batch size that halves itself when memory runs out, and says so.

    Attributes
    ----------
    size : int
        Draws at a time, >= 1. It changes memory and speed, never which noise is drawn.

    Raises
    ------
    ValueError
        A size below 1.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"batch_size={self.size}: at least one noisy copy goes through the model at a time")

    def map(self, compute: Callable[[int, int], Result], *, first: int, count: int) -> Iterator[Result]:
        """Yield ``compute(first, n)`` for consecutive batches of draws that together cover `count`.

        Parameters
        ----------
        compute : callable of (first, count)
            Called again, with half as many draws, after running out of memory.
        first, count : int
            Numbers of the draws.

        Raises
        ------
        RuntimeError, MemoryError
            From `compute`, if not even one draw fits.
        """
        stop = first + count
        while first < stop:
            step, result = self.until_it_fits(lambda size, first=first: (size, compute(first, size)), most=stop - first)
            yield result
            first += step

    def until_it_fits(self, compute: Callable[[int], Result], *, most: int | None = None) -> Result:
        """``compute(size)`` for at most so many images, called again with half as many after running out of memory."""
        while True:
            size = self.size if most is None else min(self.size, most)
            try:
                return compute(size)
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            # Outside the handler, where the failed batch is no longer referenced.
            self.size = size // 2
            logger.warning("out of memory with batches of %d images; going on with %d", size, self.size)
            if torch.accelerator.is_available():  # memory that torch keeps for later
                torch.get_device_module(torch.accelerator.current_accelerator()).empty_cache()


def make_batches(
    size: int | None, device: torch.device, shape: tuple[int, ...], *, bytes_each: int | None = None
) -> Batches:
    """Batches of the given size, or of what the free memory of the device affords for images of a shape."""
    return Batches(suggested_batch_size(device, shape, bytes_each=bytes_each) if size is None else size)


def suggested_batch_size(device: torch.device, shape: tuple[int, ...], *, bytes_each: int | None = None) -> int:
    """Choose a batch size from the free memory of a device.

    Parameters
    ----------
    device : torch.device
    shape : tuple of int
        Shape of one image, for example ``(3, 224, 224)``.
    bytes_each : int, optional
        Memory that one copy takes, where it is known better than from its shape.

    Returns
    -------
    int
        A power of two, 1 to 128 on a CPU and to 1024 elsewhere.
    """
    per_image = bytes_each or _WORKING_SET * torch.Size(shape).numel() * torch.float32.itemsize
    affordable = max(1, int(_SHARE_OF_FREE_MEMORY * _free_memory(device) / per_image))
    return min(_LARGEST.get(device.type, _LARGEST_ON_ACCELERATORS), 1 << (affordable.bit_length() - 1))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a CPU or on an accelerator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def _free_memory(device: torch.device) -> int:
    module = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        return module.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def map_copies(
    compute: Callable[[Tensor], Result],
    pixels: Tensor,
    stream: NoiseStream,
    *,
    batches: Batches,
    count: int,
    first: int = 0,
) -> Iterator[Result]:
    """Yield what a function makes of each batch of noisy copies of one image.

    Parameters
    ----------
    compute : callable
        float32 [b, 3, H, W] -> anything.
    pixels : float32 [3, H, W]
        In [0, 1], before the model's normalisation.
    stream : NoiseStream
    batches : Batches
        How many copies at a time.
    first, count : int
        Which draws.
    """

    def on_copies(first: int, count: int) -> Result:
        return compute(noisy_copies(pixels, stream, first=first, count=count))

    return batches.map(on_copies, first=first, count=count)


@torch.inference_mode()
def noisy_features(
    model: DualEncoder,
    dataset: ImageDataset,
    *,
    sigma: float,
    role: Role,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Encode one noisy copy of every image.

    Parameters
    ----------
    model : DualEncoder
    dataset : ImageDataset
    sigma : float
        Noise standard deviation in [0, 1] pixel units at the model's input size; 0 is the clean image.
    role : {"adapt", "select", "estimate"}
        Features to learn from take "adapt". The splits of a data set share its id, so fitting on "estimate" noise
        would be fitting on the noise that certifies the image of the same index.
    seed : int
    batch_size : int
        Changes memory and speed, never the noise.

    Returns
    -------
    float32 [n, d]
        Unit-norm image features, on the CPU.
    """
    features = []
    for start in range(0, len(dataset), batch_size):
        pixels = model.prepare(dataset.images[start : start + batch_size])  # [b, 3, H, W]
        for row, index in enumerate(dataset.indices[start : start + batch_size] if sigma else ()):
            pixels[row] = noisy_copies(pixels[row], NoiseStream(seed, dataset.id, int(index), sigma, role))[0]
        features.append(model.encode_image(pixels).float().cpu())
    return torch.cat(features)


@torch.no_grad()
def noisy_bank(
    model: DualEncoder,
    dataset: ImageDataset,
    *,
    sigmas: Sequence[Sigma],
    draws: int,
    seed: int,
    choose: np.random.Generator,
    augmentation: CropAndFlip | None = None,
    perturbation: Perturbation = PIXEL_NOISE,
) -> Tensor:
    """Encode noisy copies of every image, each at a noise level drawn from a set and, if asked, cropped before.

    Returns
    -------
    float32 [n, draws, d]
        Unit-norm features; the noise has the role "adapt".

    Raises
    ------
    ValueError
        An augmentation that does more than crop and mirror, or none of its kind.
    """
    degraded = getattr(augmentation, "sigmas", ()) or getattr(augmentation, "corruptions", ())
    if degraded or not isinstance(augmentation, CropAndFlip | None):
        raise ValueError(
            f"augmentation={augmentation!r}: give None or CropAndFlip(crop=..., flip=...); copies are cropped and "
            "mirrored, their noise is that of `sigmas`"
        )
    levels = choose.choice(len(sigmas), size=(len(dataset), draws))
    batches = make_batches(None, model.device, (3, model.image_size, model.image_size))
    rows = []
    for image, index, drawn in zip(dataset.images, dataset.indices, levels, strict=True):
        pixels = model.prepare(image[None])[0].to(model.device)
        streams = [NoiseStream(seed, dataset.id, int(index), sigmas[level], "adapt", perturbation) for level in drawn]

        def encode(first: int, count: int, pixels: Tensor = pixels, streams: list[NoiseStream] = streams) -> Tensor:
            def copy(number: int) -> Tensor:
                stream = streams[number]
                image = pixels if augmentation is None else stream.cropped(pixels, augmentation, number=number)
                return noisy_copies(image, stream, first=number)

            return model.encode_image(torch.cat([copy(number) for number in range(first, first + count)]))

        rows.append(torch.cat(list(batches.map(encode, first=0, count=draws))))
    return torch.stack(rows)


@torch.inference_mode()
def vote(
    model: DualEncoder, class_features: Tensor, pixels: Tensor, stream: NoiseStream, *, n: int, batch_size: int = 64
) -> Tensor:
    """Count the base classifier's answers over n noisy copies of one image.

    The most frequent answer estimates the smoothed classifier g(x) = argmax_y P[f(x + noise) = y]
    (Cohen et al. 2019, Eq. 1). A count is no certificate: it carries no confidence.

    Parameters
    ----------
    model : DualEncoder
    class_features : float [K, d]
        Unit-norm text features.
    pixels : float32 [3, H, W]
        One prepared image in [0, 1].
    stream : NoiseStream
    n : int
        Number of noisy copies.
    batch_size : int

    Returns
    -------
    int64 [K]
        Votes per class; they sum to n.
    """

    def count_answers(copies: Tensor) -> Tensor:
        answers = model.probabilities(model.encode_image(copies), class_features).argmax(1).cpu()
        return torch.bincount(answers, minlength=len(class_features))

    parts = map_copies(count_answers, pixels, stream, batches=Batches(batch_size), count=n)
    return sum(parts, torch.zeros(len(class_features), dtype=torch.int64))

"""Gaussian noise in pixel space, from streams that any part of a computation can draw from.

Every draw is addressed by (seed, data set, image index, sigma, role, draw number). Results therefore
do not depend on batch size, order, number of workers or on where an interrupted run resumed. The numbers
themselves come from torch's generator of the device, so a CPU and a GPU draw different noise. On a CPU that
generator takes 32 bits of an address: draws come from 4e9 fixed noise images, whose share of a class differs
from its probability by about 1e-5 times the standard deviation of a vote, far less than any number of draws tells.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.models.dual_encoder import DualEncoder

Role = Literal["adapt", "select", "estimate"]


@dataclass(frozen=True)
class NoiseStream:
    """An endless, addressable sequence of Gaussian noise images for one image.

    Attributes
    ----------
    seed : int
    dataset : str
        Id of the data set.
    index : int
        Position of the image in its full split.
    sigma : float
        Standard deviation in [0, 1] pixel units, >= 0.
    role : {"adapt", "select", "estimate"}
        What the noise is for. Prompts may only ever see "adapt"; a certificate's class comes from
        "select" and its bound from "estimate".

    Raises
    ------
    ValueError
        Negative sigma or unknown role.
    """

    seed: int
    dataset: str
    index: int
    sigma: float
    role: Role

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < float("inf"):
            raise ValueError(f"sigma={self.sigma}: noise levels are standard deviations >= 0 in [0, 1] pixel units")
        if self.role not in get_args(Role):
            raise ValueError(f"unknown noise role {self.role!r}; choose one of {', '.join(get_args(Role))}")

    def draw(
        self, shape: tuple[int, ...], *, first: int = 0, count: int = 1, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw noise images number `first` to ``first + count - 1``.

        Parameters
        ----------
        shape : tuple of int
            Shape of one image, for example ``(3, 64, 64)``.
        first, count : int
        device : torch.device
            Where the noise is drawn and stays.

        Returns
        -------
        float32 [count, *shape]
            N(0, sigma^2), independent over draws and pixels.
        """
        noise = torch.empty(count, *shape, device=device)
        generator = torch.Generator(noise.device)
        for row, seed in enumerate(self._draw_seeds(first, count)):
            noise[row].normal_(0, self.sigma, generator=generator.manual_seed(seed))
        return noise

    def decoding_seeds(self, first: int, count: int) -> list[int]:
        """Seeds for a randomised classifier, one a draw; independent of the noise of the same draw."""
        return list(self._draw_seeds(first, count, purpose=', "decoding"'))

    def _draw_seeds(self, first: int, count: int, *, purpose: str = "") -> Iterator[int]:
        """Hash the address of each draw; hashing the common beginning once takes most of the cost away."""
        # 1 and 1.0, or numpy's numbers, are the same address.
        address = json.dumps([int(self.seed), self.dataset, int(self.index), float(self.sigma), self.role])
        common = hashlib.blake2b(address.removesuffix("]").encode(), digest_size=8)
        for number in range(first, first + count):
            whole = common.copy()
            whole.update(f", {number}{purpose}]".encode())
            yield int.from_bytes(whole.digest(), "big", signed=True)


def noisy_copies(pixels: Tensor, stream: NoiseStream, *, first: int = 0, count: int = 1) -> Tensor:
    """Add a stream's noise to copies of one image; nothing is clipped, as in Cohen et al. (2019).

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
    return stream.draw(tuple(pixels.shape), first=first, count=count, device=pixels.device).add_(pixels)


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
            stream = NoiseStream(seed, dataset.id, int(index), sigma, role)
            pixels[row] += stream.draw(tuple(pixels.shape[1:]))[0]
        features.append(model.encode_image(pixels).float().cpu())
    return torch.cat(features)


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
    votes = torch.zeros(len(class_features), dtype=torch.int64)
    for first in range(0, n, batch_size):
        count = min(batch_size, n - first)
        features = model.encode_image(noisy_copies(pixels, stream, first=first, count=count))
        answers = model.probabilities(features, class_features).argmax(1).cpu()
        votes += torch.bincount(answers, minlength=len(votes))
    return votes

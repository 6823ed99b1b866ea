"""Images to train on: several data sets as one numbered series, and random changes of each image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from medrobust_lib.checks import check_choice
from medrobust_lib.corruptions.suites import MEDIMETA_C, SEVERITIES
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.geometry import CropAndFlip, crop_and_flip
from medrobust_lib.smoothing.perturbations import PERTURBATIONS, PIXEL_NOISE, Sigma, as_level, find_perturbation


@dataclass(frozen=True)
class Augmentation(CropAndFlip):
    """What is changed at random in a training image, anew in every epoch.

    The defaults are those of RobustMedCLIP: crops of 80 to 100 % of the area and mirror images, all clean.

    Attributes
    ----------
    crop, flip
        As in `CropAndFlip`.
    sigmas : tuple of float, or of tuples of float
        Noise levels in the units of the perturbation, one of them drawn for each noisy image; nothing is clipped.
    perturbation : str
        Name of what noisy images are made by, as in `certify_dataset`.
    corruptions : tuple of str
        Names of suite "medimeta-c", one of them drawn for each corrupted image, at severity 1 to 5, all equally
        likely. Corrupted is the image as it is stored, before the model's resize.
    share : float in [0, 1]
        Of the images that get noise or a corruption; where both are given, either with the same chance, never both.

    Raises
    ------
    ValueError
        A number out of range, or an unknown corruption (the closest names are given).
    """

    sigmas: tuple[Sigma, ...] = ()
    corruptions: tuple[str, ...] = ()
    share: float = 0.5
    perturbation: str = PIXEL_NOISE.name

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("perturbation", self.perturbation, PERTURBATIONS)  # a name: it is written beside the adapter
        family = find_perturbation(self.perturbation)
        object.__setattr__(self, "sigmas", tuple(map(as_level, self.sigmas)))
        names = (self.corruptions,) if isinstance(self.corruptions, str) else tuple(self.corruptions)
        object.__setattr__(self, "corruptions", names)
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share}: give the share of images that are degraded, 0 to 1")
        for sigma in self.sigmas:
            if sigma != 0:
                family.check_sigma(sigma)
        for name in self.corruptions:
            MEDIMETA_C.corruption(name)


PAPER_AUGMENTATION = Augmentation()


def draw_degradations(augmentation: Augmentation, count: int, *, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw which images are degraded, and how.

    Parameters
    ----------
    augmentation : Augmentation
    count : int
        Number of images n.
    rng : numpy.random.Generator

    Returns
    -------
    int64 [n]
        0 leaves an image clean, 1 adds noise, 2 corrupts.
    """
    offered = [kind for kind, given in ((1, augmentation.sigmas), (2, augmentation.corruptions)) if given]
    if not offered:
        return np.zeros(count, np.int64)
    kinds = rng.choice(np.array(offered, np.int64), count)
    return np.where(rng.random(count) < augmentation.share, kinds, 0)


def corrupt_at_random(
    images: NDArray[np.uint8], augmentation: Augmentation, *, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Corrupt each image by a corruption and at a severity of its own.

    Parameters
    ----------
    images : uint8 [n, H, W, 3]
        At least 28 pixels high and wide.
    augmentation : Augmentation
        With at least one corruption.
    rng : numpy.random.Generator

    Returns
    -------
    uint8 [n, H, W, 3]
        A new array.

    Raises
    ------
    ValueError
        Images that are too small to be corrupted.
    """
    corrupted = np.empty_like(images)
    for row, image in enumerate(images):
        corruption = MEDIMETA_C.corruption(augmentation.corruptions[rng.integers(len(augmentation.corruptions))])
        corrupted[row] = corruption.apply(image, severity=int(rng.choice(SEVERITIES)), rng=rng)
    return corrupted


def add_noise(pixels: Tensor, augmentation: Augmentation, *, generator: torch.Generator) -> Tensor:
    """Perturb each image, at a level of its own.

    Parameters
    ----------
    pixels : float [n, 3, H, W]
        In [0, 1], before the model's normalisation.
    augmentation : Augmentation
        With at least one noise level.
    generator : torch.Generator
        On the device of the pixels.

    Returns
    -------
    float [n, 3, H, W]
        Not clipped.
    """
    levels = augmentation.sigmas
    drawn = torch.randint(len(levels), (len(pixels),), generator=generator, device=pixels.device)
    if augmentation.perturbation != PIXEL_NOISE.name:
        family = find_perturbation(augmentation.perturbation)
        theta = torch.empty(len(pixels), *family.shape(tuple(pixels.shape[1:])), device=pixels.device)
        for row, level in zip(theta, drawn.tolist(), strict=True):
            family.draw_into(row, levels[level], generator)
        return family.apply(pixels, theta)
    levels = torch.tensor(levels, dtype=pixels.dtype, device=pixels.device)
    noise = torch.randn(pixels.shape, generator=generator, dtype=pixels.dtype, device=pixels.device)
    return torch.addcmul(pixels, noise, levels[drawn].view(-1, 1, 1, 1))


Rows = NDArray[np.int64]

_LARGEST_CACHE = 1 << 30  # bytes: 87,000 images of 64 px, 7,100 of 224 px
_SHARE_OF_FREE_MEMORY = 0.25
_CHUNK = 128


def cache_budget() -> int:
    """Bytes that prepared images may take: 1 GiB, or a quarter of the free memory where that is less."""
    return min(_LARGEST_CACHE, int(_SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available))


class TrainingImages:
    """The images of several data sets, numbered through in the order of the sets.

    Parameters
    ----------
    model : DualEncoder
        Whose `prepare` brings them to its geometry.
    sets : sequence of ImageDataset
    budget : int
        Bytes that may be spent on keeping prepared images as 8-bit values; where they do not fit, images are
        prepared anew each time they are asked for. It changes speed, never the pixels.

    Attributes
    ----------
    set_of, label_of : int64 [n]
        Place of each image's set among the sets, and its label in that set.
    kept : uint8 [n, 3, S, S] or None
        The prepared images, if they are kept.
    """

    def __init__(self, model: DualEncoder, sets: Sequence[ImageDataset], *, budget: int) -> None:
        self._model, self._sets = model, tuple(sets)
        self._first = np.cumsum([0, *(len(data) for data in sets)])[:-1]
        self.set_of = np.repeat(np.arange(len(sets)), [len(data) for data in sets])
        self.label_of = np.concatenate([data.labels for data in sets])
        self.kept = self._prepare_all() if len(self) * 3 * model.image_size**2 <= budget else None

    def __len__(self) -> int:
        return len(self.set_of)

    @property
    def bytes(self) -> int:
        """Memory that the kept images take."""
        return 0 if self.kept is None else self.kept.nbytes

    def pixels(self, rows: Rows) -> Tensor:
        """Prepared images, float32 [b, 3, S, S] in [0, 1], on the CPU; `rows` are int64 [b]."""
        if self.kept is not None:
            return self.kept[torch.from_numpy(rows)].float().div_(255)
        return self._prepare(rows)

    def augmented(
        self, rows: Rows, augmentation: Augmentation, *, rng: np.random.Generator, generator: torch.Generator
    ) -> Tensor:
        """Prepared images with random changes.

        Parameters
        ----------
        rows : int64 [b]
        augmentation : Augmentation
        rng : numpy.random.Generator
            Of everything that is drawn for images as they are stored.
        generator : torch.Generator
            Of everything that is drawn for prepared ones; its device is that of the result.

        Returns
        -------
        float32 [b, 3, S, S]
        """
        kinds = draw_degradations(augmentation, len(rows), rng=rng)
        pixels = self.pixels(rows)
        corrupt, noisy = (torch.from_numpy(np.flatnonzero(kinds == kind)) for kind in (2, 1))
        if len(corrupt):
            pixels[corrupt] = self._prepare(
                rows[corrupt.numpy()], lambda images: corrupt_at_random(images, augmentation, rng=rng)
            )
        pixels = crop_and_flip(pixels.to(generator.device), augmentation, generator=generator)
        if len(noisy):
            noisy = noisy.to(pixels.device)
            pixels[noisy] = add_noise(pixels[noisy], augmentation, generator=generator)
        return pixels

    def _prepare(self, rows: Rows, change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None) -> Tensor:
        """Prepared images, those of one set together, after an optional change of the stored ones."""
        pixels = torch.empty(len(rows), 3, self._model.image_size, self._model.image_size)
        for number in np.unique(self.set_of[rows]):
            places = np.flatnonzero(self.set_of[rows] == number)
            images = self._sets[number].images[rows[places] - self._first[number]]
            pixels[torch.from_numpy(places)] = self._model.prepare(images if change is None else change(images))
        return pixels

    def _prepare_all(self) -> Tensor | None:
        """All images as 8-bit values, or None if the model's `prepare` gives others than whole 255ths."""
        kept = torch.empty(len(self), 3, self._model.image_size, self._model.image_size, dtype=torch.uint8)
        for start in range(0, len(self), _CHUNK):
            pixels = self._prepare(np.arange(start, min(start + _CHUNK, len(self))))
            levels = (255 * pixels).round().to(torch.uint8)
            if not torch.equal(levels.float().div_(255), pixels):
                return None
            kept[start : start + _CHUNK] = levels
        return kept

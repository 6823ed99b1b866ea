"""Images of several data sets as one numbered series in a model's geometry, kept in memory where they fit."""

from collections.abc import Callable, Sequence

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from medrobust_lib.adaptation.augmentation import (
    Augmentation,
    add_noise,
    corrupt_at_random,
    crop_and_flip,
    draw_degradations,
)
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.models.dual_encoder import DualEncoder

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

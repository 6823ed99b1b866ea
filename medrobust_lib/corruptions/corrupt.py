"""Corrupt images of a suite at a severity, each from its own addressable stream of random numbers."""

import hashlib
import json
import operator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medrobust_lib.corruptions.pixels import Pixels, as_luma, check_images
from medrobust_lib.corruptions.suites import Suite, check_severity, find_suite


def corrupt(
    images: Pixels,
    name: str,
    *,
    severity: int,
    seed: int = 0,
    dataset: str = "",
    first_index: int = 0,
    suite: str | Suite = "medimeta-c",
    indices: ArrayLike | None = None,
) -> Pixels:
    """Corrupt a batch of images or a single one.

    The random numbers of image i are addressed by (seed, dataset, index, corruption, severity). The result therefore
    does not depend on how images are batched, ordered or spread over workers.

    Parameters
    ----------
    images : uint8 [n, H, W, 3], [n, H, W], [H, W, 3] or [H, W]
        RGB or gray, at least 28 x 28 pixels. Gray images are corrupted as RGB copies would be and come back as luma.
        Three equal channels get coloured noise, but for the gray sets of suite "medmnist-c", where all come back gray.
        The suites' parameters are meant for 224 x 224 and are applied unchanged at every size.
    name : str
        A corruption of the suite, such as "gaussian_noise".
    severity : int
        1 (mild) to 5 (strong); 0 returns a copy of the images.
    seed : int
    dataset : str
        Id of the data set; part of the address, and in suite "medmnist-c" the choice of the parameters.
    first_index : int
        Position of the first image in its full split.
    suite : {"medimeta-c", "medmnist-c"} or Suite
    indices : int64 [n], optional
        Positions of the images in their full split, where they are not consecutive; replaces `first_index`.

    Returns
    -------
    uint8, shaped like images
        A new array.

    Raises
    ------
    TypeError
        Images that are not a uint8 array, such as float or 16-bit ones; the message says how to convert.
    ValueError
        Unknown corruption, severity, suite or data set; images of a wrong shape, with an alpha channel, smaller than
        28 pixels or none at all; indices that do not fit the images.

    Examples
    --------
    >>> import numpy as np
    >>> gray = np.full((4, 28, 28), 100, np.uint8)
    >>> corrupt(gray, "brightness", severity=2)[0, 0, 0]
    np.uint8(151)
    """
    suite = find_suite(suite)
    corruption = suite.corruption(name, dataset=dataset)
    luma = suite.family(dataset) in suite.gray
    severity = check_severity(severity)
    batch = images if check_images(images) else images[None]
    places = _places(len(batch), first_index, indices)
    if severity == 0:
        return np.array(images, order="C", subok=False)
    corrupted = np.empty(batch.shape, np.uint8)
    for row, (image, place) in enumerate(zip(batch, places, strict=True)):
        rng = random_stream(seed, dataset, int(place), name, severity)
        result = corruption.apply(image, severity=severity, rng=rng)
        corrupted[row] = as_luma(result) if luma else result
    return corrupted.reshape(images.shape)


def random_stream(seed: int, dataset: str, index: int, name: str, severity: int) -> np.random.Generator:
    """Random numbers of one image under one corruption."""
    address = json.dumps([operator.index(seed), dataset, int(index), name, int(severity)]).encode()
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(address, digest_size=16).digest(), "big"))


def _places(count: int, first_index: int, indices: ArrayLike | None) -> NDArray[np.int64]:
    """Position of every image in its full split."""
    places = np.atleast_1d(np.arange(count) + first_index if indices is None else np.asarray(indices))
    if places.shape != (count,):
        raise ValueError(f"{count} images but indices of shape {places.shape}; give one index per image")
    if not np.issubdtype(places.dtype, np.integer) or places.min() < 0:
        raise ValueError(f"indices are positions in a split, whole numbers >= 0; got {places[:5].tolist()}")
    return places.astype(np.int64)

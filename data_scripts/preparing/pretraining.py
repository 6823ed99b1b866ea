"""What the scripts that train demo models share: many phantoms rendered at once, and their one augmentation."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from medrobust_lib.phantoms import phantom_classes, render_phantoms

_CHUNK = 60


def render_many(
    modalities: Sequence[str], *, split: str, site: str, count: int, image_size: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Render the first images of a split for several modalities, on all cores.

    Parameters
    ----------
    modalities : sequence of str
        In the order wanted.
    split, site, image_size
        As in `render_phantoms`.
    count : int
        Images of each modality.

    Returns
    -------
    images : uint8 [n, image_size, image_size, 3]
    labels : int64 [n]
        They run over all classes of all modalities, in the order of ``modalities``.
    """
    jobs = [
        (modality, range(start, min(start + _CHUNK, count)), split, site, image_size)
        for modality in modalities
        for start in range(0, count, _CHUNK)
    ]
    offsets = dict(
        zip(modalities, np.cumsum([0, *(len(phantom_classes(name)) for name in modalities)])[:-1], strict=True)
    )
    with ProcessPoolExecutor() as pool:
        parts = list(tqdm(pool.map(_render, jobs), total=len(jobs), desc=f"phantoms {split} {site}"))
    images = np.concatenate([part for part, _ in parts])
    return images, np.concatenate([labels + offsets[job[0]] for job, (_, labels) in zip(jobs, parts, strict=True)])


def shifted(images: NDArray[np.uint8], shift: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Shift each image [n, H, W, 3] by up to ``shift`` pixels in both directions, its edges repeated."""
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
    side = images.shape[1]
    offsets = rng.integers(0, 2 * shift + 1, (len(images), 2))
    return np.stack([image[y : y + side, x : x + side] for image, (y, x) in zip(padded, offsets, strict=True)])


def exposed(
    images: NDArray[np.float32],
    *,
    share: float,
    contrast: tuple[float, float],
    brightness: float,
    gain: float,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """Record a share of the images [n, H, W, 3] in [0, 1] with another exposure, as devices and operators do.

    ``contrast`` scales the distance from the image's mean (log-uniform in this range), ``gain`` every channel
    (up to this share), ``brightness`` shifts all (up to this much); clipped to [0, 1].
    """
    count = len(images)
    chosen = (rng.random(count) < share)[:, None, None, None]
    factor = np.exp(rng.uniform(*np.log(contrast), (count, 1, 1, 1)))
    channels = 1 + rng.uniform(-gain, gain, (count, 1, 1, 3))
    offset = rng.uniform(-brightness, brightness, (count, 1, 1, 1))
    mean = images.mean((1, 2, 3), keepdims=True)
    other = np.clip(((images - mean) * factor + mean) * channels + offset, 0, 1)
    return np.where(chosen, other, images).astype(np.float32)


def _render(job: tuple[str, range, str, str, int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    modality, indices, split, site, image_size = job
    return render_phantoms(modality, list(indices), split=split, site=site, image_size=image_size)

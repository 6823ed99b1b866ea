"""The two benchmark suites: which corruptions they hold and what their five severities mean.

Parameters are in pixels of a 224 x 224 image and in grey levels, and are applied unchanged at every size, as the
benchmarks' authors do: a blur of 41 pixels is far stronger at 28 x 28 than at 224 x 224. Compare results at one size.

ImageNet-C adds to the brightness and shrinks contrast about each channel's mean; MedMNIST-C multiplies both, as PIL's
enhancers do. Their functions are separate, because their parameters do not translate into each other. A gray image is
corrupted as three equal channels with independent noise, then its luma is taken, which is what the public packages do
with gray images: the noise of a gray image is milder than its sigma says.

Number, size, place, colour and opacity of what is drawn on blood smears follow MedMNIST-C's generator. Its random
numbers come from another source, so no single image can be equal. Bubbles have the same law at its 224 x 224 pixels.
The official stain deposits are ten drawn masks of each size that ship with its package; ours are drawn anew, of the
same size and colour, and fill less of their square (.53 of it; the official masks fill .63 at 24 pixels and .54 at
32). So stain deposits are alike, not equal in law: accuracies under them are not comparable digit by digit.
"""

import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from medrobust_lib.checks import check_choice, closest
from medrobust_lib.corruptions import functions
from medrobust_lib.corruptions.blur import defocus_blur, gaussian_blur, motion_blur, zoom_blur
from medrobust_lib.corruptions.functions import Pixels, check_images
from medrobust_lib.data.dataset import ImageDataset

SEVERITIES = (1, 2, 3, 4, 5)

Parameter = float | int | tuple[float, ...]


@dataclass(frozen=True)
class Corruption:
    """A function with the parameters of its five severities.

    Attributes
    ----------
    name : str
        The name in the benchmark's files.
    function : callable
        Pure function of an image and keyword parameters; it takes ``rng`` too if it draws anything.
    severities : tuple of five mappings
        Parameters of severity 1 to 5.
    """

    name: str
    function: Callable[..., Pixels]
    severities: tuple[Mapping[str, Parameter], ...]

    @cached_property
    def random(self) -> bool:
        """Whether the corruption draws random numbers."""
        return "rng" in signature(self.function).parameters

    def apply(self, image: Pixels, *, severity: int, rng: np.random.Generator) -> Pixels:
        """Corrupt one image, uint8 [H, W, 3] or [H, W], at severity 1 to 5."""
        parameters = self.severities[severity - 1]
        return self.function(image, **parameters, rng=rng) if self.random else self.function(image, **parameters)


@dataclass(frozen=True)
class Suite:
    """Corruptions of a benchmark.

    Attributes
    ----------
    id : str
    corruptions : tuple of str
        Names in the benchmark's order; for a suite with a list per data set, the union of the lists.
    extra : tuple of str
        Further names that the suite can make and the benchmark does not evaluate.
    families : mapping of str to tuple of Corruption
        What each family of data sets gets. One family named "" serves every data set.
    gray : frozenset of str
        Families whose results are luma, whatever the channels of the images, as in the benchmark's files.
    """

    id: str
    corruptions: tuple[str, ...]
    extra: tuple[str, ...]
    families: Mapping[str, tuple[Corruption, ...]]
    gray: frozenset[str] = frozenset()

    def family(self, dataset: str = "") -> str:
        """Family whose parameters a data set gets.

        Parameters
        ----------
        dataset : str
            Id such as "phantom/blood", "medmnist/oct" or "medimeta/pbc", or a family's name.

        Raises
        ------
        ValueError
            The suite has parameters per data set and none for this one; those it has are listed.
        """
        if "" in self.families:
            return ""
        last = dataset.rsplit("/", 1)[-1]
        found = _FAMILY_OF.get(last, last)
        if found not in self.families:
            raise ValueError(
                f"suite {self.id} has its own parameters for each kind of data set and none for {dataset!r}; "
                f"it knows {', '.join(self.families)}{_closest(last, (*self.families, *_FAMILY_OF))}"
            )
        return found

    def names(self, dataset: str = "") -> tuple[str, ...]:
        """Names that are evaluated on a data set, in order."""
        return tuple(c.name for c in self.families[self.family(dataset)] if c.name not in self.extra)

    def corruption(self, name: str, *, dataset: str = "") -> Corruption:
        """Look up a corruption and its parameters for a data set.

        Raises
        ------
        ValueError
            Unknown name; the valid ones, the closest match and a suite that has the name are given.
        """
        family = self.family(dataset)
        offered = {corruption.name: corruption for corruption in self.families[family]}
        if name not in offered:
            others = [other for other in SUITES.values() if other.id != self.id]
            elsewhere = [other.id for other in others if name in (*other.corruptions, *other.extra)]
            raise ValueError(
                f"unknown corruption {name!r} in suite {self.id}{f' for {family}' if family else ''}; "
                f"choose one of {', '.join(offered)}{_closest(name, offered)}"
                + (f"; suite {elsewhere[0]} has {name!r}" if elsewhere else "")
            )
        return offered[name]


def find_suite(suite: str | Suite) -> Suite:
    """Suite of an id.

    Raises
    ------
    ValueError
        Unknown id; the valid ones and the closest match are given.
    """
    if isinstance(suite, Suite):
        return suite
    check_choice("suite", suite, SUITES)
    return SUITES[suite]


def check_severity(severity: object) -> int:
    """Severity as an int, or a ValueError that lists the valid ones."""
    if isinstance(severity, bool) or not isinstance(severity, int | np.integer) or not 0 <= severity <= 5:
        raise ValueError(f"severity {severity!r}: choose 1, 2, 3, 4 or 5, or 0 for the unchanged image")
    return int(severity)


def _closest(name: object, among: Iterable[str]) -> str:
    close = closest(str(name), among, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _row(name: str, function: Callable[..., Pixels], **columns: tuple[Parameter, ...]) -> Corruption:
    """Corruption from one column of five values per parameter."""
    values = zip(*columns.values(), strict=True)
    return Corruption(name, function, tuple(MappingProxyType(dict(zip(columns, row, strict=True))) for row in values))


def _zooms(stop: float, step: float) -> tuple[float, ...]:
    """Zoom factors from 1 on, to the last bit those of the public implementation: a crop's size can hang on it."""
    return tuple(np.arange(1, stop, step).tolist())


# ImageNet-C's constants (Hendrycks and Dietterich 2019). Imam et al. (2025) name ImageNet-C as their model and publish
# no constants, so that MediMeta-C was made with these is an assumption.
_IMAGENET_C = (
    _row("gaussian_noise", functions.gaussian_noise, sigma=(0.08, 0.12, 0.18, 0.26, 0.38)),
    _row("impulse_noise", functions.impulse_noise, amount=(0.03, 0.06, 0.09, 0.17, 0.27)),
    _row("motion_blur", motion_blur, radius=(10, 15, 15, 15, 20), sigma=(3, 5, 8, 12, 15)),
    _row(
        "zoom_blur",
        zoom_blur,
        factors=(_zooms(1.11, 0.01), _zooms(1.16, 0.01), _zooms(1.21, 0.02), _zooms(1.26, 0.02), _zooms(1.31, 0.03)),
    ),
    _row("brightness", functions.brightness, added=(0.1, 0.2, 0.3, 0.4, 0.5)),
    _row("contrast", functions.contrast, factor=(0.4, 0.3, 0.2, 0.1, 0.05)),
    _row("pixelate", functions.pixelate, factor=(0.6, 0.5, 0.4, 0.3, 0.25)),
    _row("jpeg_compression", functions.jpeg_compression, quality=(25, 18, 15, 10, 7)),
)

# The official MedMNIST-C registry (Di Salvo et al. 2024, package medmnistc 0.1.0), its evaluated five severities.
_JPEG = _row("jpeg_compression", functions.jpeg_compression, quality=(50, 30, 15, 10, 7))
_COARSE_PIXELS = _row("pixelate", functions.pixelate, factor=(0.3, 0.25, 0.2, 0.15, 0.1))
_BRIGHTER = _row("brightness_up", functions.scale_brightness, factor=(1.1, 1.2, 1.3, 1.4, 1.5))
_DARKER = _row("brightness_down", functions.scale_brightness, factor=(0.9, 0.8, 0.7, 0.6, 0.5))
_FLATTER = _row("contrast_down", functions.scale_contrast, factor=(0.9, 0.8, 0.7, 0.6, 0.4))
_SPECKLE = _row("speckle_noise", functions.speckle_noise, sigma=(0.1, 0.15, 0.2, 0.25, 0.3))

_MEDMNIST_C: Mapping[str, tuple[Corruption, ...]] = MappingProxyType(
    {
        "blood": (
            _row("pixelate", functions.pixelate, factor=(0.6, 0.5, 0.4, 0.3, 0.25)),
            _JPEG,
            _row("defocus_blur", defocus_blur, radius=(2, 3, 4, 5, 6), edge_sigma=(0.01, 0.1, 0.1, 0.1, 0.1)),
            _row("motion_blur", motion_blur, radius=(3, 5, 10, 10, 10), sigma=(3, 5, 5, 7, 9)),
            _row("brightness_up", functions.scale_brightness, factor=(1.1, 1.2, 1.3, 1.35, 1.4)),
            _DARKER,
            _row("contrast_up", functions.scale_contrast, factor=(1.1, 1.15, 1.2, 1.25, 1.3)),
            _row("contrast_down", functions.scale_contrast, factor=(0.9, 0.8, 0.7, 0.6, 0.5)),
            _row("saturate", functions.saturate, added=(0.05, 0.1, 0.15, 0.17, 0.2)),
            _row("stain_deposit", functions.stain_deposit, most=(1, 2, 3, 3, 3), side=(24, 24, 24, 24, 32)),
            _row("bubble", functions.bubble, largest_radius=(5, 7, 10, 12, 15), most=(10, 10, 10, 12, 12)),
        ),
        "breast": (
            _COARSE_PIXELS,
            _JPEG,
            _SPECKLE,
            _row("motion_blur", motion_blur, radius=(5, 9, 9, 13, 17), sigma=(5, 7, 10, 10, 12)),
            _row("brightness_up", functions.scale_brightness, factor=(1.4, 1.5, 1.6, 1.8, 2.0)),
            _row("brightness_down", functions.scale_brightness, factor=(0.55, 0.5, 0.45, 0.4, 0.3)),
            _FLATTER,
        ),
        "pneumonia": (
            _row("pixelate", functions.pixelate, factor=(0.8, 0.7, 0.6, 0.5, 0.4)),
            _JPEG,
            _row("gaussian_noise", functions.gaussian_noise, sigma=(0.04, 0.05, 0.06, 0.07, 0.08)),
            _row("speckle_noise", functions.speckle_noise, sigma=(0.05, 0.07, 0.1, 0.15, 0.2)),
            _row("impulse_noise", functions.impulse_noise, amount=(0.005, 0.01, 0.013, 0.017, 0.02)),
            _row("shot_noise", functions.shot_noise, photons=(300, 200, 150, 100, 80)),
            _row("gaussian_blur", gaussian_blur, width=(3, 5, 7, 9, 11)),
            _BRIGHTER,
            _DARKER,
            _row("contrast_up", functions.scale_contrast, factor=(1.1, 1.2, 1.3, 1.4, 1.6)),
            _FLATTER,
            _row("gamma_corr_up", functions.gamma_correction, exponent=(1.1, 1.2, 1.3, 1.4, 1.6)),
            _row("gamma_corr_down", functions.gamma_correction, exponent=(0.9, 0.8, 0.7, 0.6, 0.4)),
        ),
        "retina": (
            _row("pixelate", functions.pixelate, factor=(0.8, 0.6, 0.5, 0.4, 0.35)),
            _row("jpeg_compression", functions.jpeg_compression, quality=(30, 25, 20, 10, 5)),
            _row("gaussian_noise", functions.gaussian_noise, sigma=(0.04, 0.08, 0.12, 0.16, 0.2)),
            _SPECKLE,
            _row("defocus_blur", defocus_blur, radius=(4, 5, 6, 7, 8), edge_sigma=(0.1, 0.2, 0.3, 0.4, 0.5)),
            _row("motion_blur", motion_blur, radius=(8, 15, 15, 15, 20), sigma=(5, 5, 8, 12, 15)),
            _DARKER,
            _FLATTER,
        ),
        "oct": (
            _COARSE_PIXELS,
            _row("jpeg_compression", functions.jpeg_compression, quality=(30, 15, 10, 7, 5)),
            _row("speckle_noise", functions.speckle_noise, sigma=(0.15, 0.3, 0.4, 0.5, 0.6)),
            _row("defocus_blur", defocus_blur, radius=(0.5, 1, 1.5, 2, 2.5), edge_sigma=(0.6, 0.5, 0.1, 0.5, 0.1)),
            _row("motion_blur", motion_blur, radius=(10, 15, 15, 15, 20), sigma=(3, 5, 8, 12, 15)),
            _row("contrast_down", functions.scale_contrast, factor=(0.6, 0.4, 0.3, 0.2, 0.15)),
        ),
    }
)
_FAMILY_OF = MappingProxyType(
    {
        "bloodmnist": "blood",
        "pbc": "blood",
        "breastmnist": "breast",
        "pneumoniamnist": "pneumonia",
        "chest": "pneumonia",
        "retinamnist": "retina",
        "fundus": "retina",
        "octmnist": "oct",
    }
)

MEDIMETA_C = Suite(
    id="medimeta-c",
    corruptions=tuple(row.name for row in _IMAGENET_C if row.name != "jpeg_compression"),
    extra=("jpeg_compression",),  # of ImageNet-C, not of MediMeta-C
    families=MappingProxyType({"": _IMAGENET_C}),
)
MEDMNIST_C = Suite(
    id="medmnist-c",
    corruptions=tuple(dict.fromkeys(row.name for rows in _MEDMNIST_C.values() for row in rows)),
    extra=(),
    families=_MEDMNIST_C,
    gray=frozenset({"breast", "pneumonia", "oct"}),
)
SUITES: Mapping[str, Suite] = MappingProxyType({suite.id: suite for suite in (MEDIMETA_C, MEDMNIST_C)})


def corrupt(
    images: Pixels,
    name: str,
    *,
    severity: int,
    seed: int = 0,
    dataset: str = "",
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
    suite : {"medimeta-c", "medmnist-c"} or Suite
    indices : int64 [n], optional
        Positions of the images in their full split; 0 to n - 1 by default.

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
    gray = keeps_gray(suite, dataset)
    severity = check_severity(severity)
    batch = images if check_images(images) else images[None]
    places = _places(len(batch), indices)
    if severity == 0:
        return np.array(images, order="C", subok=False)
    results = np.empty(batch.shape, np.uint8)
    for row, (image, place) in enumerate(zip(batch, places, strict=True)):
        rng = random_stream(seed, dataset, int(place), name, severity)
        results[row] = corruption.apply(image, severity=severity, rng=rng)
    if gray and results.ndim == 4:
        results[...] = luma(results)[..., None]
    return results.reshape(images.shape)


def corrupted(
    data: ImageDataset, name: str, *, severity: int, seed: int = 0, suite: str = "medimeta-c"
) -> ImageDataset:
    """Corrupt a data set in memory.

    The suite "medmnist-c" makes ultrasound, X-ray and OCT images gray, as the official files are; everything else is
    corrupted as RGB, so that noise on a gray image is coloured, as with the public implementations of ImageNet-C.
    Every image has its own random stream, keyed by (seed, data set, index in the full split, corruption,
    severity), so an image gets the same bytes in any subset, and in the files of `write_benchmark`.

    Parameters
    ----------
    data : ImageDataset
    name : str
        A corruption of the suite.
    severity : {0, 1, 2, 3, 4, 5}
        0 leaves the images as they are.
    seed : int
    suite : {"medimeta-c", "medmnist-c"}

    Returns
    -------
    ImageDataset
        The same id, labels and indices; ``provenance["corruption"]`` says what was done.

    Raises
    ------
    TypeError, ValueError
        As from `corrupt`: unknown corruption, severity or suite.
    """
    if not isinstance(data, ImageDataset):
        raise TypeError(f"data must be an ImageDataset, not {type(data).__name__}; bare arrays go to `corrupt`")
    gray = keeps_gray(suite, data.id)
    clean = luma(data.images) if gray else data.images
    options = {"seed": seed, "dataset": data.id, "suite": suite, "indices": data.indices}
    images = corrupt(clean, name, severity=severity, **options)
    if gray:
        images = np.repeat(images[..., None], 3, axis=3)
    done = {"name": name, "severity": int(severity), "suite": suite, "seed": int(seed)}
    return replace(data, images=images, provenance=data.provenance | {"corruption": done})


def keeps_gray(suite: str | Suite, dataset: str) -> bool:
    """Whether a suite's images of a data set are gray: the official MedMNIST-C ends with the luma of each image."""
    found = find_suite(suite)
    return found.family(dataset) in found.gray


def luma(images: Pixels) -> Pixels:
    """Gray images [n, H, W] of RGB images as Pillow makes them; equal channels keep their values."""
    return np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])


def random_stream(seed: int, dataset: str, index: int, name: str, severity: int) -> np.random.Generator:
    """Random numbers of one image under one corruption."""
    address = json.dumps([operator.index(seed), dataset, int(index), name, int(severity)]).encode()
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(address, digest_size=16).digest(), "big"))


def _places(count: int, indices: ArrayLike | None) -> NDArray[np.int64]:
    """Position of every image in its full split."""
    places = np.atleast_1d(np.arange(count) if indices is None else np.asarray(indices))
    if places.shape != (count,):
        raise ValueError(f"{count} images but indices of shape {places.shape}; give one index per image")
    if not np.issubdtype(places.dtype, np.integer) or places.min() < 0:
        raise ValueError(f"indices are positions in a split, whole numbers >= 0; got {places[:5].tolist()}")
    return places.astype(np.int64)

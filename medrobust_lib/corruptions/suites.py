"""The benchmark suites: which corruptions they hold and what their five severities mean (``suites.toml``).

Parameters of the two published suites are in pixels of a 224 x 224 image and in grey levels, and are applied unchanged
at every size, as the benchmarks' authors do: a blur of 41 pixels is far stronger at 28 x 28 than at 224 x 224. Compare
results at one size.

ImageNet-C adds to the brightness and shrinks contrast about each channel's mean; MedMNIST-C multiplies both, as PIL's
enhancers do. Their functions are separate, because their parameters do not translate into each other. A gray image is
corrupted as three equal channels with independent noise, then its luma is taken, which is what the public packages do
with gray images: the noise of a gray image is milder than its sigma says.

Number, size, place, colour and opacity of what is drawn on blood smears follow MedMNIST-C's generator. Its random
numbers come from another source, so no single image can be equal. Bubbles have the same law at its 224 x 224 pixels.
The official stain deposits are ten drawn masks of each size that ship with its package; ours are drawn anew, of the
same size and colour, and fill less of their square (.53 of it; the official masks fill .63 at 24 pixels and .54 at
32). So stain deposits are alike, not equal in law: accuracies under them are not comparable digit by digit.

The third suite, clinical-c, is this library's own. Its lengths are shares of the image's side, and its severities are
calibrated by structural similarity on phantoms of 64 x 64 pixels (``clinical.toml``).
"""

import hashlib
import json
import operator
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from inspect import signature
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from medrobust_lib.checks import check_choice, closest
from medrobust_lib.corruptions import blur, functions, optics, radiology
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
    families : mapping of str to tuple of Corruption
        What each family of data sets gets. One family named "" serves every data set.
    extra : tuple of str
        Names that the suite can make and the benchmark does not evaluate.
    gray : frozenset of str
        Families whose results are luma, whatever the channels of the images, as in the benchmark's files.
    family_of : mapping of str to str
        Family by the last part of a data set's id, where the two differ.
    """

    id: str
    families: Mapping[str, tuple[Corruption, ...]]
    extra: tuple[str, ...] = ()
    gray: frozenset[str] = frozenset()
    family_of: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def corruptions(self) -> tuple[str, ...]:
        """Names that the benchmark evaluates, in its order; of lists per family the union."""
        names = dict.fromkeys(row.name for rows in self.families.values() for row in rows)
        return tuple(name for name in names if name not in self.extra)

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
        last = dataset.rsplit("/", 1)[-1].removesuffix("-site-a")  # phantoms of the other scanner
        found = self.family_of.get(last, last)
        if found not in self.families:
            raise ValueError(
                f"suite {self.id} has its own parameters for each kind of data set and none for {dataset!r}; "
                f"it knows {', '.join(self.families)}{_closest(last, (*self.families, *self.family_of))}. Of own "
                "images say what they show: --kind of `medrobust corrupt`, dataset= of `corrupt`"
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


def _read_suites() -> Mapping[str, Suite]:
    """The suites of ``suites.toml``, the third with the constants of ``clinical.toml``."""
    tables, calibrated = map(_read_table, ("suites.toml", "clinical.toml"))
    tables["clinical-c"]["families"] = calibrated["families"]
    suites = {}
    for id, table in tables.items():
        families = {
            family: tuple(_corruption(name, **columns) for name, columns in rows.items())
            for family, rows in table["families"].items()
        }
        suites[id] = Suite(
            id,
            MappingProxyType(families),
            extra=tuple(table.get("extra", ())),
            gray=frozenset(table.get("gray", ())),
            family_of=MappingProxyType(table.get("family_of", {})),
        )
    return MappingProxyType(suites)


def _read_table(name: str) -> dict[str, Any]:
    return tomllib.loads(files("medrobust_lib.corruptions").joinpath(name).read_text(encoding="utf-8"))


def _corruption(
    name: str, *, function: str = "", **columns: Sequence[float] | Sequence[Mapping[str, float]]
) -> Corruption:
    """Corruption from one column of five values per parameter; the function's name where it is another."""
    home = next(module for module in (functions, blur, radiology, optics) if hasattr(module, function or name))
    severities = []
    for values in zip(*columns.values(), strict=True):
        parameters = dict(zip(columns, values, strict=True))
        if "zooms" in parameters:
            # To the last bit those of the public implementation: a crop's size can hang on it.
            zooms = parameters.pop("zooms")
            parameters["factors"] = tuple(np.arange(1, zooms["stop"], zooms["step"]).tolist())
        severities.append(MappingProxyType(parameters))
    return Corruption(name, getattr(home, function or name), tuple(severities))


SUITES: Mapping[str, Suite] = _read_suites()
MEDIMETA_C, MEDMNIST_C, CLINICAL_C = SUITES["medimeta-c"], SUITES["medmnist-c"], SUITES["clinical-c"]


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
        Three equal channels get coloured noise from "medimeta-c"; the gray sets of the other suites come back gray.
        The published suites' parameters are meant for 224 x 224 and are applied unchanged at every size.
    name : str
        A corruption of the suite, such as "gaussian_noise".
    severity : int
        1 (mild) to 5 (strong); 0 returns a copy of the images.
    seed : int
    dataset : str
        Id of the data set; part of the address, and in all suites but "medimeta-c" the choice of the parameters.
    suite : {"medimeta-c", "medmnist-c", "clinical-c"} or Suite
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

    All suites but "medimeta-c" make ultrasound, X-ray and OCT images gray, as MedMNIST-C's files are; everything else
    is corrupted as RGB, so that noise on a gray image is coloured, as with the public implementations of ImageNet-C.
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
    suite : {"medimeta-c", "medmnist-c", "clinical-c"}

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
    """Whether a suite's images of a data set are gray, as the official MedMNIST-C ends with the luma of each image."""
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

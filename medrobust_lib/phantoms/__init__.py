"""Synthetic phantoms: seeded drawings that imitate six imaging modalities.

They are not patients' images and say nothing about patients. They exist so that every notebook runs
without a download: their classes mirror the public sets' classes, and their two acquisition sites
give the demonstration a train-to-test shift.
"""

import tomllib
from collections.abc import Sequence
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from medrobust_lib.checks import check_choice, check_whole
from medrobust_lib.phantoms import blood, breast, chest, fundus, histology, oct
from medrobust_lib.phantoms.painting import Site, acquire

MODALITIES = {module.__name__.rpartition(".")[2]: module for module in (histology, blood, breast, chest, fundus, oct)}
SITES = ("A", "B")
# "pretrain" exists to train demo models; the benchmark never reads it.
SPLITS = {"train": 1440, "val": 360, "test": 720, "pretrain": 10080}
SMALLEST, LARGEST = 28, 512


def _recorders() -> dict[str, dict[str, Site]]:
    """Sites of each modality, of ``sites.toml``."""
    table = tomllib.loads(files(__name__).joinpath("sites.toml").read_text(encoding="utf-8"))
    return {modality: {site: Site(**row) for site, row in rows.items()} for modality, rows in table.items()}


RECORDERS = _recorders()


def phantom_classes(modality: str) -> tuple[str, ...]:
    """Class names of a modality, in label order."""
    return tuple(_module(modality).PAINTERS)


def render_phantoms(
    modality: str,
    indices: Sequence[int] | NDArray[np.int64],
    *,
    split: str,
    site: str = "B",
    image_size: int = 64,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Render phantoms by their index.

    An image depends on (modality, site, split, index) and nothing else, so any subset can be drawn
    anywhere. No two splits or sites share a random stream: the seed sequence holds all four keys.

    Parameters
    ----------
    modality : {"histology", "blood", "breast", "chest", "fundus", "oct"}
    indices : sequence of int
        Positions in the split; label ``index % number of classes``, so each split is balanced.
    split : {"train", "val", "test", "pretrain"}
    site : {"A", "B"}
        A trained the demo models; B is the benchmark.
    image_size : int
        Side in pixels, 28 to 512.

    Returns
    -------
    images : uint8 [n, image_size, image_size, 3]
    labels : int64 [n]

    Raises
    ------
    ValueError
        Unknown modality, split or site; size or index out of range.
    """
    module = _module(modality)
    check_choice("split", split, SPLITS)
    check_choice("site", site, SITES)
    check_whole("image_size", image_size, least=SMALLEST, most=LARGEST, hint=" px, in which phantoms are drawn")
    indices = np.asarray(indices, dtype=np.int64)
    if indices.size and not 0 <= indices.min() <= indices.max() < SPLITS[split]:
        raise ValueError(f"phantom indices of split {split!r} run from 0 to {SPLITS[split] - 1}")
    recorder = RECORDERS[modality][site]
    painters = list(module.PAINTERS.values())
    labels = indices % len(painters)
    images = np.empty((len(indices), image_size, image_size, 3), np.uint8)
    keys = (tuple(MODALITIES).index(modality), SITES.index(site), tuple(SPLITS).index(split))
    for row, (index, label) in enumerate(zip(indices, labels, strict=True)):
        rng = np.random.default_rng([*keys, int(index)])
        scene = painters[label](rng, image_size)
        images[row] = acquire(scene, recorder, rng)
    return images, labels


def _module(modality: str):  # noqa: ANN202 - a module has no useful static type
    check_choice("modality", modality, MODALITIES)
    return MODALITIES[modality]

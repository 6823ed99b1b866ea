"""Adapters of demo-clip that come with the package: how they were trained, and finding the one that fits."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from medrobust_lib.adaptation.training import Recipe
from medrobust_lib.adaptation.training_images import PAPER_AUGMENTATION, Augmentation
from medrobust_lib.models.adapters import weights_identity
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.weights import DEMO_FOLDER

FOLDER = DEMO_FOLDER.parent / "adapters"
DATASETS = tuple(f"phantom/{name}" for name in ("histology", "blood", "breast", "chest", "fundus", "oct"))
RECIPE: Mapping[str, Any] = MappingProxyType({"epochs": 10, "learning_rate": 2e-3, "schedule": "one-cycle"})
FINE_TUNING: Mapping[str, Any] = MappingProxyType({**RECIPE, "learning_rate": 1e-3})
"""The same for all weights of the image tower; like RECIPE it was judged on validation images."""
NOISY = Augmentation(sigmas=(0.1, 0.2))
"""A second kind of adapters: half of the images carry Gaussian noise of one of these levels."""


def folder_name(*, fraction: float, rank: int, seed: int, augmentation: Augmentation = PAPER_AUGMENTATION) -> str:
    """Name of the folder of an adapter."""
    noise = "-noise" if augmentation.sigmas else ""
    return f"rank{rank}-{100 * fraction:g}percent-seed{seed}{noise}"


def find_demo_adapter(
    model: DualEncoder,
    datasets: Sequence[str],
    *,
    fraction: float,
    rank: int,
    seed: int,
    augmentation: Augmentation = PAPER_AUGMENTATION,
) -> Path | None:
    """Folder of the adapter that was trained on exactly this, for `load_model` or `load_adapter`.

    Parameters
    ----------
    model : DualEncoder
        The model to adapt.
    datasets : sequence of str
        Ids, in order.
    fraction : float
        Of each train split, in (0, 1].
    rank : int
    seed : int
        Of the draw of images and of the training.
    augmentation : Augmentation

    Returns
    -------
    Path or None
        None where no such adapter comes with the package, or the model has other weights.
    """
    folder = FOLDER / folder_name(fraction=fraction, rank=rank, seed=seed, augmentation=augmentation)
    if tuple(datasets) != DATASETS or not folder.is_dir():
        return None
    stored = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    same_recipe = stored["recipe"] == Recipe(**RECIPE, augmentation=augmentation, seed=seed).as_json()
    return folder if same_recipe and stored["adapter"]["base"]["weights"] == weights_identity(model) else None

"""Linear probe: logistic regression on frozen image features, the plainest use of a few labelled images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from medrobust_lib import metrics
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.smoothing.noise import noisy_features

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Weights of the L2 penalty that `linear_probe` chooses from."""

_MOST_STEPS = 1000


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Rows that take the place of class features; `linear_probe` learns them.

    Attributes
    ----------
    weights : float32 [K, d]
        Coefficients divided by the model's ``logit_scale``, on the CPU: as ``class_features`` of
        `DualEncoder.probabilities` or of `evaluation.Candidate` they give the regression's probabilities. Rows
        are not of unit norm.
    strength : float
        The chosen weight of the L2 penalty.
    val_accuracy, val_balanced_accuracy : float in [0, 1]
        At this strength.
    choices : DataFrame
        Columns strength, val_accuracy, val_balanced_accuracy, a row per strength, ascending.
    provenance : dict
        JSON values: model, data and images.
    """

    weights: Tensor = field(repr=False)
    strength: float
    val_accuracy: float
    val_balanced_accuracy: float
    choices: pd.DataFrame = field(repr=False)
    provenance: dict[str, Any] = field(repr=False)


def linear_probe(
    model: DualEncoder,
    train: ImageDataset,
    *,
    validation: ImageDataset,
    strengths: Sequence[float] = STRENGTHS,
    batch_size: int = 64,
) -> LinearProbe:
    """Fit multinomial logistic regression without intercept on unit-norm image features.

    Minimises the summed cross-entropy plus ``strength / 2`` times the squared norm of the weights. The strength
    with the highest balanced accuracy on the validation images is taken; of equals, the strongest. Nothing is
    random.

    Parameters
    ----------
    model : DualEncoder
        Frozen.
    train : ImageDataset
        Labelled images to learn from, at least one of each class.
    validation : ImageDataset
        Other images of the same classes, to choose the strength by.
    strengths : sequence of float
        Weights of the L2 penalty, above 0.
    batch_size : int
        Images that are encoded at a time; changes memory and speed.

    Returns
    -------
    LinearProbe

    Raises
    ------
    ValueError
        A class without images to learn from, other classes in `validation`, an image in both sets, or a strength
        that is not above 0.

    References
    ----------
    Radford et al. 2021, arXiv:2103.00020, section 3.2.
    """
    _check_strengths(strengths)
    _check_data(train, validation)
    features, shown = (
        noisy_features(model, data, sigma=0.0, role="adapt", batch_size=batch_size).numpy().astype(np.float64)
        for data in (train, validation)
    )
    rows, fitted = [], {}
    # Of two classes scikit-learn fits the difference w of the rows -w / 2 and w / 2, twice as long, squared, as both.
    scale = 2 if len(train.classes) == 2 else 1
    for strength in sorted(set(map(float, strengths)), reverse=True):
        # Features of one model differ little, so the loss is flat: L-BFGS takes thousands of steps, and at the default
        # tolerance it stops far from the minimum.
        regression = LogisticRegression(
            C=scale / strength, fit_intercept=False, solver="newton-cg", tol=1e-6, max_iter=_MOST_STEPS
        )
        # Products this small gain nothing from threads, and lose much where the cores are busy otherwise.
        with threadpool_limits(limits=1):
            regression.fit(features, train.labels)
        answers = regression.predict(shown)
        rows.append((
            strength,
            metrics.accuracy(validation.labels, answers),
            metrics.balanced_accuracy(validation.labels, answers),
        ))  # fmt: skip
        fitted[strength] = _row_per_class(regression.coef_)
    table = pd.DataFrame(rows, columns=["strength", "val_accuracy", "val_balanced_accuracy"])
    best = table.iloc[table.val_balanced_accuracy.argmax()]  # the first of equals
    return LinearProbe(
        weights=torch.from_numpy(fitted[best.strength] / model.logit_scale).float(),
        strength=float(best.strength),
        val_accuracy=float(best.val_accuracy),
        val_balanced_accuracy=float(best.val_balanced_accuracy),
        choices=table.iloc[::-1].reset_index(drop=True),
        provenance={
            "method": "linear probe", "model": model.id, "dataset": train.id, "split": train.split,
            "images": [int(index) for index in train.indices],
            "validation": {"split": validation.split, "images": [int(index) for index in validation.indices]},
            "strength": float(best.strength), "strengths": [float(strength) for strength in strengths],
        },
    )  # fmt: skip


def _row_per_class(coefficients: np.ndarray) -> np.ndarray:
    """Weights [K, d] in C order; one row, of two classes, is their difference."""
    if len(coefficients) == 1:
        coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
    return np.ascontiguousarray(coefficients)


def _check_strengths(strengths: Sequence[float]) -> None:
    if not len(strengths):
        raise ValueError("strengths=(): give at least one weight of the penalty, such as 1.0")
    for strength in strengths:
        if not 0 < strength < math.inf:
            raise ValueError(f"strengths hold {strength!r}: the weight of the penalty must be above 0")


def _check_data(train: ImageDataset, validation: ImageDataset) -> None:
    for noun, count in train.class_counts().items():
        if not count:
            raise ValueError(f"{train.id}: no image of class {noun!r} to learn from; draw a fraction that has all")
    if train.classes != validation.classes:
        raise ValueError(
            f"the classes to learn, {list(train.classes)}, are not those of the validation images, "
            f"{list(validation.classes)}; give validation images of the same data set"
        )
    if (train.id, train.split) == (validation.id, validation.split):
        both = np.intersect1d(train.indices, validation.indices)
        if len(both):
            raise ValueError(
                f"{train.id}: {len(both)} images of the split {train.split!r} are learned from and validated on "
                f"(image {both[0]}, for one); give other images for validation"
            )

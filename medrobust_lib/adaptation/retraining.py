"""Two classical baselines that learn from labels: the image tower re-trained on noisy images, and the linear probe.

Re-training (Gaussian data augmentation) is the oldest way to a base classifier that stands the noise of randomized
smoothing. It gives up what makes a vision-language model convenient: there is one more set of image weights for every
noise level, and it takes labels.
"""

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional

from medrobust_lib import metrics
from medrobust_lib.adaptation.training import Recipe, check_apart, check_learnable, templates_of
from medrobust_lib.checks import check_positive, check_whole
from medrobust_lib.data.dataset import ImageDataset, draw_shots
from medrobust_lib.experiments import progress
from medrobust_lib.models.dual_encoder import DualEncoder, find_image_tower
from medrobust_lib.smoothing.certify import check_not_training
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies, noisy_features
from medrobust_lib.smoothing.perturbations import (
    PIXEL_NOISE,
    Perturbation,
    Sigma,
    check_levels,
    find_perturbation,
    level_in_words,
)

_WEIGHT_DECAY = 0.01


def retrain_on_noise(
    model: DualEncoder,
    data: ImageDataset,
    *,
    sigma: Sigma,
    perturbation: str | Perturbation = PIXEL_NOISE,
    shots: int | None = None,
    templates: Sequence[str] | None = None,
    epochs: int = 20,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> DualEncoder:
    """Train a copy of the image tower on noisy images against the fixed class features of the text tower.

    Minimises the cross-entropy of ``logit_scale`` times the cosine between class features and features of
    ``x + sigma * N(0, I)``, or of copies by another perturbation, with fresh noise in every epoch and nothing clipped.
    The copy exists before any image is certified, so it is a fixed classifier of the noisy image and its certificates
    are the standard ones.

    Trained are the parameters that image features depend on and text features do not; the text tower stays bit for
    bit. Batch normalisation of the image tower uses the statistics of the noisy batches; those that it keeps are
    averages over the last epoch, so they belong to noisy images and to (almost) final weights. Dropout and
    stochastic depth stay off.

    Parameters
    ----------
    model : DualEncoder
        In evaluation mode; not changed. Training is in float32 even if it computes in half precision, to which
        the copy returns: there the finest changes are rounded away.
    data : ImageDataset
        Labelled images to train on, never those that will be certified.
    sigma : float or tuple of float
        Noise level, >= 0, in the units of the perturbation; 0 is ordinary fine-tuning.
    perturbation : str or Perturbation
        As in `certify_dataset`.
    shots : int, optional
        Images per class, the same as `learn_prompts` draws with this seed; a class with fewer gives all it has,
        with a warning. None takes all images.
    templates : sequence of str, optional
        Prompts of the class features; default: the first of the data set.
    epochs : int
    batch_size : int
        At most so many images a step; the steps of an epoch are of equal size, give or take one image.
    learning_rate : float
        Of AdamW (weight decay .01); the rate falls to 0 along a cosine. The default suits demo-clip; large pre-trained
        transformers are usually fine-tuned at about 1e-5.
    seed : int
        Of shots, order and noise. Equal seeds give equal weights on the same CPU.

    Returns
    -------
    DualEncoder
        A frozen copy in evaluation mode, on the device and in the type of `model`. Its ``id`` names sigma, its
        ``provenance`` holds the recipe.

    Warns
    -----
    UserWarning
        The loss of the last epoch is no better than that of guessing; or see `shots`.

    Raises
    ------
    ValueError
        A parameter out of range, a class without images, a model in training mode or without a trainable image
        tower, batches too small for batch normalisation, or training that diverges.

    References
    ----------
    Cohen et al. 2019, arXiv:1902.02918, section 3.3; Lecuyer et al. 2019, arXiv:1802.03471.
    """
    check_not_training(model)
    family = find_perturbation(perturbation)
    (sigma,) = check_levels([sigma], family, model.image_size)
    recipe = Recipe(check_whole("epochs", epochs), batch_size, learning_rate, _WEIGHT_DECAY, seed=seed)
    check_learnable(data)
    chosen = data if shots is None else draw_shots(data, shots, np.random.default_rng(seed))
    streams = [NoiseStream(seed, data.id, int(index), sigma, "adapt", family) for index in chosen.indices]
    templates = templates_of(data, templates)
    # Notebooks often switch gradients off as a whole, some by inference mode.
    with torch.inference_mode(False), torch.enable_grad():
        texts = model.class_features(data.classes, templates).detach()
        retrained = model.trainable_copy()
        fitted = _fit(retrained, chosen, streams, texts, recipe)
        retrained = retrained.eval().requires_grad_(False).to(model.dtype)
    guessing = math.log(len(data.classes))
    if fitted["last_loss"] >= guessing:
        warnings.warn(
            f"re-training {model.id} at sigma {level_in_words(sigma)} ended at a loss of {fitted['last_loss']:.2f}, no "
            f"better than guessing ({guessing:.2f}): try a lower learning_rate than {learning_rate:g} (large pre-"
            f"trained towers take about 1e-5) or more epochs than {epochs}",
            UserWarning,
            stacklevel=2,
        )
    words = "" if family == PIXEL_NOISE else f"on {family.name} "
    retrained.id = f"{model.id} retrained {words}at sigma {level_in_words(sigma)}"
    retrained.provenance = {
        "method": "noise-augmented re-training", "base": {**model.provenance, **model.identity()},
        "dataset": data.id, "split": data.split,
        "images": [int(index) for index in chosen.indices], "shots": shots, "templates": templates,
        "perturbation": family.name, "sigma": sigma,
        "epochs": epochs, "batch_size": batch_size, "optimiser": "AdamW, cosine to 0",
        "learning_rate": learning_rate, "weight_decay": _WEIGHT_DECAY, "seed": seed, **fitted,
    }  # fmt: skip
    return retrained


def _fit(
    model: DualEncoder, chosen: ImageDataset, streams: Sequence[NoiseStream], texts: Tensor, recipe: Recipe
) -> dict[str, Any]:
    """Train the image tower in place; returns the mean loss of the first and the last epoch, and time."""
    started = time.monotonic()
    tower = find_image_tower(model)
    per_epoch = math.ceil(len(chosen) / recipe.batch_size)
    if tower.norms and len(chosen) // per_epoch < 2:
        raise ValueError(
            f"batch_size={recipe.batch_size}: {len(chosen)} images would be split into steps of one image, too few for "
            "the batch normalisation of this image tower; give a batch_size of 3 or more"
        )
    generator = torch.Generator().manual_seed(recipe.seed)
    labels = torch.from_numpy(chosen.labels).to(model.device)
    optimiser = torch.optim.AdamW(tower.parameters.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    total = recipe.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
    momenta = {name: norm.momentum for name, norm in tower.norms.items()}
    for norm in tower.norms.values():
        norm.train().momentum = None  # a plain average since the last reset
    losses = []
    described = f"re-train {model.id}, sigma {level_in_words(streams[0].sigma)}"
    for step in progress(range(total), total=total, unit="steps", resumes=False, description=described):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            batches = torch.randperm(len(chosen), generator=generator).tensor_split(per_epoch)
            for norm in tower.norms.values():
                norm.reset_running_stats()
        rows = batches[place]
        pixels = model.prepare(chosen.images[rows.numpy()]).to(model.device)
        noisy = torch.cat([
            noisy_copies(image, streams[row], first=epoch) for image, row in zip(pixels, rows.tolist(), strict=True)
        ])  # fmt: skip
        logits = model.logit_scale * model.encode_image(noisy) @ texts.T
        loss = functional.cross_entropy(logits, labels[rows.to(model.device)])
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"training diverged in epoch {epoch + 1}: lower learning_rate={recipe.learning_rate}")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    optimiser.zero_grad()
    for name, norm in tower.norms.items():
        norm.momentum = momenta[name]
    return {
        "first_loss": float(np.mean(losses[:per_epoch])),
        "last_loss": float(np.mean(losses[-per_epoch:])),
        "seconds": round(time.monotonic() - started, 1),
        "threads": torch.get_num_threads(),
    }


STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Weights of the L2 penalty that `linear_probe` chooses from."""


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
    if not len(strengths):
        raise ValueError("strengths=(): give at least one weight of the penalty, such as 1.0")
    for strength in strengths:
        check_positive("strengths", strength, hint=": it is the weight of the penalty")
    check_learnable(train)
    check_apart(train, validation)
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
            C=scale / strength, fit_intercept=False, solver="newton-cg", tol=1e-6, max_iter=1000
        )
        # Products this small gain nothing from threads, and lose much where the cores are busy otherwise.
        with threadpool_limits(limits=1):
            regression.fit(features, train.labels)
        answers = regression.predict(shown)
        rows.append({
            "strength": strength,
            "val_accuracy": metrics.accuracy(validation.labels, answers),
            "val_balanced_accuracy": metrics.balanced_accuracy(validation.labels, answers),
        })  # fmt: skip
        rows_of = regression.coef_ if scale == 1 else np.concatenate([-regression.coef_ / 2, regression.coef_ / 2])
        fitted[strength] = np.ascontiguousarray(rows_of)
    best = max(rows, key=lambda row: row["val_balanced_accuracy"])  # the first of equals
    return LinearProbe(
        weights=torch.from_numpy(fitted[best["strength"]] / model.logit_scale).float(),
        **best,
        choices=pd.DataFrame(rows[::-1]),
        provenance={
            "method": "linear probe", "model": model.id, "dataset": train.id, "split": train.split,
            "images": [int(index) for index in train.indices],
            "validation": {"split": validation.split, "images": [int(index) for index in validation.indices]},
            "strength": best["strength"], "strengths": [float(strength) for strength in strengths],
        },
    )  # fmt: skip

"""How well a model does: on corrupted images, in one call or step by step, and under gradient attacks."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from medrobust_lib import metrics
from medrobust_lib.checks import suggest
from medrobust_lib.corruptions.stored import CLEAN
from medrobust_lib.corruptions.suites import SEVERITIES, corrupted, find_suite
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.registry import load_dataset
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.loading import load_model

_BATCHES = 16  # whose images are corrupted at a time
Answered = tuple[str, str, int]  # name of the classifier, corruption and severity
Predictions = dict[Answered, NDArray[np.int64]]
"""By name of the classifier, corruption ("clean") and severity (0): the predicted class of each image."""


class Candidate(NamedTuple):
    """A zero-shot classifier: an image tower and the features of its class texts."""

    encoder: DualEncoder
    class_features: Tensor  # float [K, d], unit norm


@torch.inference_mode()
def benchmark(
    model: DualEncoder | str,
    data: ImageDataset | str,
    *,
    reference: DualEncoder | str | None = None,
    suite: str = "medimeta-c",
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Measure a zero-shot model on clean and corrupted images, in one table.

    Class texts are made of the data set's first template, the papers'.

    Parameters
    ----------
    model : DualEncoder or str
        Or its id, as for `load_model`.
    data : ImageDataset or str
        Or its id, as for `load_dataset`: all test images.
    reference : DualEncoder or str, optional
        Model whose errors are 100; without one, the model's own clean error is.
    suite, corruptions, severities, seed, batch_size
        As in `corruption_answers`.

    Returns
    -------
    DataFrame
        A row for the clean images, one per corruption, and their mean. Columns: severity_1 and so on (accuracy),
        accuracy and error (means over severities), ce (the error in percent of the reference's; of the mean: mCE; NaN
        where the reference makes no error), relative_to (what 100 is), constant (nearly one answer in any of the sets:
        its accuracy then means nothing), chance (accuracy of a blind guess) and n (images).

    Raises
    ------
    ValueError
        Unknown model, data set, suite, corruption or severity; the closest names are given.
    """
    data = load_dataset(data) if isinstance(data, str) else data
    candidates = {}
    for name, one in (("model", model), ("reference", reference)):
        if one is not None:
            encoder = load_model(one) if isinstance(one, str) else one
            candidates[name] = Candidate(encoder, encoder.class_features(data.classes, data.templates[:1]))
    options = {"corruptions": corruptions, "severities": severities, "seed": seed, "batch_size": batch_size}
    cells = accuracy_table(corruption_answers(candidates, data, suite=suite, **options), data)
    names = cells["corruption"].drop_duplicates().drop(0).tolist()  # the first row is the clean one
    error = 1 - cells.pivot(index=["model", "corruption"], columns="severity", values="accuracy")
    clean, errors = error.loc["model"].loc[CLEAN, 0], error.loc["model"].loc[names].drop(columns=0)
    base_clean, base = clean, np.full((len(names), 1), clean)
    if reference is not None:
        base_clean, base = error.loc["reference"].loc[CLEAN, 0], error.loc["reference"].loc[names].drop(columns=0)
    table = (1 - errors).add_prefix("severity_")
    table["error"] = errors.mean(axis="columns")
    table["ce"] = metrics.corruption_error(errors, base)
    table.loc["mean"] = [*table.mean().drop("ce"), metrics.mean_corruption_error(errors, base)]
    table.loc[CLEAN, ["error", "ce"]] = clean, metrics.relative_clean_error(clean, base_clean)
    constant = cells[cells["model"] == "model"].groupby("corruption")["constant"].any()
    constant["mean"] = constant.any()
    relative_to = "own clean error" if reference is None else candidates["reference"].encoder.id
    facts = {"constant": constant, "relative_to": relative_to, "chance": 1 / len(data.classes), "n": len(data)}
    table.insert(len(severities), "accuracy", 1 - table["error"])
    return table.loc[[CLEAN, *names, "mean"]].assign(**facts).rename_axis(columns=None)


@torch.inference_mode()
def corruption_probabilities(
    candidates: Mapping[str, Candidate],
    data: ImageDataset,
    *,
    suite: str = "medimeta-c",
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    batch_size: int = 64,
    make: Callable[..., ImageDataset] | None = None,
) -> Iterator[tuple[Answered, NDArray[np.float32]]]:
    """Class probabilities by classifiers of the clean images and of every corruption and severity of a suite.

    Each corrupted image is made once, some hundred at a time, and every classifier sees the same one; classifiers that
    share an image tower (the same object) share its features, those of one geometry the prepared images.

    Parameters
    ----------
    candidates : mapping of str to Candidate
        Classifiers under the names that tables will show.
    data : ImageDataset
    suite : {"medimeta-c", "medmnist-c", "clinical-c"}
    corruptions : sequence of str, optional
        Of the suite; by default all that it evaluates on this data set.
    severities : sequence of int
        Of 1 to 5.
    seed : int
        Of the corruptions.
    batch_size : int
        Changes memory and speed.
    make : callable, optional
        ``make(data, corruption, severity=...)`` gives the corrupted set, for instance from a file; default:
        `corrupted`, with the seed and the suite.

    Yields
    ------
    (name, corruption, severity), float32 [n, K]
        Clean images are ``(name, "clean", 0)``.

    Raises
    ------
    ValueError
        No candidates, or as from `medrobust_lib.corruptions.suites.corrupted`.
    """
    if not candidates:
        raise ValueError("no candidates to evaluate; give at least one")
    names = find_suite(suite).names(data.id) if corruptions is None else corruptions
    here = partial(corrupted, seed=seed, suite=suite)
    variants = [(CLEAN, 0), *((c, s) for c in names for s in severities)]
    for corruption, severity in variants:
        parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in candidates}
        for part in _parts(data, batch_size) if make is None else [data]:
            shown = part
            if severity:
                shown = (make or here)(part, corruption, severity=severity)
            features = _features([encoder for encoder, _ in candidates.values()], shown.images, batch_size)
            for name, (encoder, class_features) in candidates.items():
                parts[name].append(encoder.probabilities(features[id(encoder)], class_features).cpu().numpy())
        for name, probabilities in parts.items():
            yield (name, corruption, severity), np.concatenate(probabilities)


def corruption_answers(candidates: Mapping[str, Candidate], data: ImageDataset, **how: Any) -> Predictions:
    """Answers of classifiers on the clean images and on every corruption and severity of a suite.

    Parameters
    ----------
    candidates, data, **how
        As in `corruption_probabilities`: suite, corruptions, severities, seed, batch_size and make.

    Returns
    -------
    dict of (name, corruption, severity) to int64 [n]
        Predicted classes; clean images are ``(name, "clean", 0)``.

    Raises
    ------
    ValueError
        As `corruption_probabilities`.
    """
    return {key: found.argmax(1) for key, found in corruption_probabilities(candidates, data, **how)}


def _parts(data: ImageDataset, batch_size: int) -> Iterator[ImageDataset]:
    """A data set in pieces of whole batches, so that features do not depend on the pieces."""
    places = np.arange(len(data))
    for start in range(0, len(data), _BATCHES * batch_size):
        yield data.subset(places[start : start + _BATCHES * batch_size])


def accuracy_table(answers: Predictions, data: ImageDataset) -> pd.DataFrame:
    """Tidy accuracies of `corruption_answers`, as `medrobust_lib.metrics.corruption_error_table` takes them.

    Parameters
    ----------
    answers : dict of (name, corruption, severity) to int64 [n]
    data : ImageDataset
        The images that were answered.

    Returns
    -------
    DataFrame, one row per name, corruption and severity
        dataset, model, corruption, severity, n, accuracy with its 95 % Clopper-Pearson interval low and high,
        balanced_accuracy, majority_share, constant (gives nearly one answer).
    """
    rows = []
    for (name, corruption, severity), answer in answers.items():
        low, high = metrics.share_interval(answer == data.labels, groups=data.groups)
        rows.append(
            {
                "dataset": data.id,
                "model": name,
                "corruption": corruption,
                "severity": severity,
                "n": len(data),
                "accuracy": metrics.accuracy(data.labels, answer),
                "low": low,
                "high": high,
                "balanced_accuracy": metrics.balanced_accuracy(data.labels, answer),
                "majority_share": metrics.majority_share(answer),
                "constant": metrics.is_constant_predictor(answer),
            }
        )
    return pd.DataFrame(rows)


def corruption_intervals(
    answers: Predictions, data: ImageDataset, *, reference: str, rng: np.random.Generator
) -> pd.DataFrame:
    """Intervals of mCE and of what is lost to corruption, of every classifier in `corruption_answers`.

    95 % percentile bootstrap over images: an image and all its corrupted versions are drawn together, and the same
    images for a classifier and its reference, so that many looks at one image do not count as many images.

    Parameters
    ----------
    answers : dict of (name, corruption, severity) to int64 [n]
        All corruptions at the same severities.
    data : ImageDataset
        The images that were answered.
    reference : str
        Name of the classifier whose errors are 100.
    rng : numpy.random.Generator

    Returns
    -------
    DataFrame, one row per name
        dataset, model, low and high (of mCE, in percent of the reference; NaN where in some draw the reference makes no
        error under a corruption), lost_low and lost_high (of the clean accuracy minus that on corrupted images).

    Raises
    ------
    ValueError
        No answers of the reference.
    """
    names = list(dict.fromkeys(name for name, _, _ in answers))
    if reference not in names:
        raise ValueError(f"no answers of the reference {reference!r}.{suggest(reference, names)}")
    cells = [(corruption, severity) for name, corruption, severity in answers if name == reference and severity]
    shape = (len({corruption for corruption, _ in cells}), -1, len(data))
    right = {key: answer == data.labels for key, answer in answers.items()}
    corrupted_right = {name: np.stack([right[name, *cell] for cell in cells]).reshape(shape) for name in names}
    rows = []
    for name, correct in corrupted_right.items():  # bool [C, S, n]
        pair = correct, corrupted_right[reference]
        how = {"rng": rng, "groups": data.groups}
        mce = metrics.bootstrap_interval(metrics.mean_corruption_error, *pair, **how)
        lost = metrics.bootstrap_interval(metrics.degradation, correct, right[name, CLEAN, 0], **how)
        rows.append([data.id, name, *mce, *lost])
    return pd.DataFrame(rows, columns=["dataset", "model", "low", "high", "lost_low", "lost_high"])


def _features(encoders: Sequence[DualEncoder], images: NDArray[np.uint8], batch_size: int) -> dict[int, Tensor]:
    """Features by ``id`` of the encoder, each computed once; encoders of one geometry share the prepared images."""
    different = {id(encoder): encoder for encoder in encoders}
    parts: dict[int, list[Tensor]] = {key: [] for key in different}
    for start in range(0, len(images), batch_size):
        prepared: dict[Hashable, Tensor] = {}
        for key, encoder in different.items():
            geometry = (type(encoder).prepare, encoder.preprocessing)  # an own model may prepare in its own way
            if geometry not in prepared:
                prepared[geometry] = encoder.prepare(images[start : start + batch_size])
            parts[key].append(encoder.encode_image(prepared[geometry]))
    return {key: torch.cat(found) for key, found in parts.items()}


def projected_gradient(
    objective: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    radius: float,
    steps: int = 20,
    step_size: float | None = None,
    seed: int | None = None,
) -> Tensor:
    """Raise an objective within an L2 ball around an image: projected gradient ascent (PGD).

    Parameters
    ----------
    objective : callable
        float [n, 3, H, W] -> float [n], differentiable; larger is better for the attacker.
    image : float [3, H, W] or [n, 3, H, W]
        In [0, 1].
    radius : float
        Of the ball, > 0, in [0, 1] pixel units.
    steps : int
    step_size : float, optional
        Length of a step; default 2.5 radius / steps.
    seed : int, optional
        Start at a random point of the sphere instead of at the image.

    Returns
    -------
    Tensor
        Of the shape of `image`: the best point met, within the ball and within [0, 1].

    Raises
    ------
    ValueError
        A radius or a number of steps that is not positive, or an objective without one finite value for each image.

    References
    ----------
    Madry et al. 2018, arXiv:1706.06083, with the L2 norm.
    """
    if not 0 < radius < float("inf") or steps < 1:
        raise ValueError(f"radius={radius}, steps={steps}: an attack needs a radius above 0 and at least one step")
    single = image.ndim == 3
    clean = (image[None] if single else image).detach()
    step_size = 2.5 * radius / steps if step_size is None else step_size
    moved = clean.clone()
    if seed is not None:
        generator = torch.Generator(clean.device).manual_seed(seed)
        direction = torch.empty_like(clean).normal_(generator=generator)
        moved = _projected(clean + direction, clean, radius)
    best, best_value = moved.clone(), None
    for step in range(steps + 1):
        moved = moved.detach().requires_grad_(step < steps)
        with torch.enable_grad():
            value = objective(moved)
        if tuple(value.shape) != (len(clean),):
            raise ValueError(f"the objective returned {tuple(value.shape)} for {len(clean)} images, not one value each")
        reached = value.detach()
        if not reached.isfinite().all():
            raise ValueError(f"step {step}: the objective is {reached.tolist()}; an attack climbs finite values")
        best_value = torch.full_like(reached, -torch.inf) if best_value is None else best_value
        better = reached > best_value
        best[better], best_value[better] = moved.detach()[better], reached[better]
        if step < steps:
            (gradient,) = torch.autograd.grad(value, moved, torch.ones_like(value))
            direction = functional.normalize(gradient.flatten(1)).view_as(gradient)
            moved = _projected(moved.detach() + step_size * direction, clean, radius)
    return best[0] if single else best


def _projected(moved: Tensor, clean: Tensor, radius: float) -> Tensor:
    """Nearest point of the ball, then of [0, 1]: the second step only brings it closer to the clean image."""
    shift = moved - clean
    norm = shift.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
    return (clean + shift * (radius / norm).clamp(max=1.0)).clamp(0, 1)
